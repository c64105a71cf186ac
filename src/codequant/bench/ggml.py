"""llama.cpp's kernels for one mixture-of-experts layer, through the ggml library that a Python package ships.

The graph is the one that llama.cpp builds for a layer (`mul_mat_id` of gate, up and down, SwiGLU, weighted sum), and
the weights lie in the buffer type that it prefers for them on a CPU, which reorders some formats at load. A library
that was built for any x86-64 processor has AVX2 kernels; one built from source on the machine has that machine's.
"""

import ctypes
import weakref
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

F32, I32 = 0, 26  # enum ggml_type
TYPES = {"q4_0": 2, "iq4_nl": 20, "bf16": 30}
_TO_FLOAT = {"q4_0": "dequantize_row_q4_0", "iq4_nl": "dequantize_row_iq4_nl", "bf16": "ggml_bf16_to_fp32_row"}
_REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"  # a C++ function; older libraries lack it


_Log = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
_SILENT = _Log(lambda level, text, data: None)  # ggml reports every matrix that it reorders


class _Parameters(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


_P = c_void_p
_SIGNATURES = {
    "ggml_init": (_P, [_Parameters]),
    "ggml_new_tensor_3d": (_P, [_P, c_int, c_int64, c_int64, c_int64]),
    "ggml_mul_mat_id": (_P, [_P, _P, _P, _P]),
    "ggml_swiglu_split": (_P, [_P, _P, _P]),
    "ggml_mul": (_P, [_P, _P, _P]),
    "ggml_add": (_P, [_P, _P, _P]),
    "ggml_view_2d": (_P, [_P, _P, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, _P, _P, c_int64, c_int64, c_int64, _P]),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, c_int]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_tensor_set": (None, [_P, _P, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [_P, _P, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_free": (None, [_P]),
    "ggml_log_set": (None, [_Log, _P]),
}


@cache
def library() -> ctypes.CDLL | None:
    """ggml out of llama_cpp (built from source) or else xllamacpp (a wheel with AVX2 kernels); None without either."""
    for package, pattern in (("llama_cpp", "lib/libggml-cpu*"), ("xllamacpp", "xllamacpp*.so")):
        spec = find_spec(package)
        for path in sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []:
            handle = ctypes.CDLL(str(path))
            if all(hasattr(handle, name) for name in (*_SIGNATURES, *_TO_FLOAT.values())):
                for name, (result, arguments) in _SIGNATURES.items():
                    function = getattr(handle, name)
                    function.restype, function.argtypes = result, arguments
                handle.ggml_log_set(_SILENT, None)
                return handle
    return None


def instruction_set() -> str:
    """The widest one that the library was built for."""
    names = ("amx_int8", "avx512_vnni", "avx512", "avx_vnni", "avx2", "neon")
    return next((n for n in names if getattr(library(), f"ggml_cpu_has_{n}", lambda: 0)()), "generic")


class Experts:
    """One layer in one format. All experts hold the weights of the first, in memory of their own."""

    def __init__(self, kind: str, gate_up: Tensor, down: Tensor, experts: int, threads: int):
        """gate_up bf16 [2M, H] and down bf16 [H, M] of one expert."""
        ggml = library()
        assert ggml is not None
        self._ggml = ggml
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        weakref.finalize(self, ggml.ggml_backend_free, self._backend)
        context = self._context()
        matrices = [matrix.float().contiguous() for matrix in (*gate_up.chunk(2), down)]
        self._weights = [ggml.ggml_new_tensor_3d(context, TYPES[kind], *reversed(m.shape), experts) for m in matrices]
        self._allocate(context, repacked=kind != "bf16")
        exact, self.bytes_per_expert = [], 0
        for tensor, matrix in zip(self._weights, matrices, strict=True):
            packed, dequantized = _quantize(ggml, kind, matrix)
            exact.append(dequantized)
            self.bytes_per_expert += packed.numel()
            everything = packed.repeat(experts)
            ggml.ggml_backend_tensor_set(tensor, everything.data_ptr(), 0, everything.numel())
        self.gate_up, self.down = torch.cat(exact[:2]), exact[2]  # float32, of every expert
        self._graphs: dict[tuple[int, ...], tuple[int, list[int], int]] = {}

    def _context(self) -> int:
        context = self._ggml.ggml_init(_Parameters(1 << 20, None, True))  # room for a graph; tensors lie elsewhere
        weakref.finalize(self, self._ggml.ggml_free, context)
        return int(context)

    def _allocate(self, context: int, repacked: bool) -> None:
        kind = getattr(self._ggml, _REPACKED, None) if repacked else None
        kind = kind or self._ggml.ggml_backend_cpu_buffer_type
        kind.restype = c_void_p
        buffer = self._ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind())
        weakref.finalize(self, self._ggml.ggml_backend_buffer_free, buffer)

    def _graph(self, tokens: int, columns: int, top_k: int) -> tuple[int, list[int], int]:
        """(graph, [x, index, weights], y). ggml names dimensions from the innermost on."""
        ggml, context, (gate, up, down) = self._ggml, self._context(), self._weights
        x = ggml.ggml_new_tensor_3d(context, F32, columns, 1, tokens)
        index = ggml.ggml_new_tensor_3d(context, I32, top_k, tokens, 1)
        weights = ggml.ggml_new_tensor_3d(context, F32, 1, top_k, tokens)
        both = [ggml.ggml_mul_mat_id(context, w, x, index) for w in (gate, up)]
        out = ggml.ggml_mul_mat_id(context, down, ggml.ggml_swiglu_split(context, *both), index)
        out = ggml.ggml_mul(context, out, weights)  # [columns, top_k, tokens]
        parts = [
            ggml.ggml_view_2d(context, out, columns, tokens, 4 * columns * top_k, 4 * columns * k) for k in range(top_k)
        ]
        y = reduce(lambda a, b: ggml.ggml_add(context, a, b), parts)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, y)
        self._allocate(context, repacked=False)
        return graph, [x, index, weights], y

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], index and weights [T, k] -> float32 [T, H]."""
        key = (*x.shape, index.shape[1])
        if key not in self._graphs:
            self._graphs[key] = self._graph(*key)
        graph, inputs, output = self._graphs[key]
        given = x.float().contiguous(), index.int().contiguous(), weights.float().contiguous()
        for tensor, value in zip(inputs, given, strict=True):
            self._ggml.ggml_backend_tensor_set(tensor, value.data_ptr(), 0, value.numel() * 4)
        if status := self._ggml.ggml_backend_graph_compute(self._backend, graph):
            raise RuntimeError(f"ggml: status {status}")
        y = torch.empty(x.shape)
        self._ggml.ggml_backend_tensor_get(output, y.data_ptr(), 0, y.numel() * 4)
        return y


def _quantize(ggml: ctypes.CDLL, kind: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [O, I] -> (ggml's bytes, the float32 matrix that they stand for)."""
    rows, columns = matrix.shape
    packed = torch.empty(rows * ggml.ggml_row_size(TYPES[kind], columns), dtype=torch.uint8)
    ggml.ggml_quantize_chunk(TYPES[kind], matrix.data_ptr(), packed.data_ptr(), 0, rows, columns, None)
    exact = torch.empty(rows, columns)
    to_float = getattr(ggml, _TO_FLOAT[kind])
    to_float.restype, to_float.argtypes = None, [c_void_p, c_void_p, c_int64]
    to_float(packed.data_ptr(), exact.data_ptr(), exact.numel())
    return packed, exact
