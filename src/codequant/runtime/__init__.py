"""Running a quantized model: modules that compute on packed weights, and loading and saving through transformers."""
