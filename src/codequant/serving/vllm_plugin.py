"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in each of its processes, perhaps again."""


def register() -> None:
    import codequant.serving.vllm  # noqa: F401 - registers as it is imported, once per process
