"""What a method is called and which colour it has, the same in every table and chart."""

# Okabe and Ito's palette: colours that the colour-blind can tell apart.
BLUE, SKY, ORANGE, PURPLE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#009E73"
VERMILION, YELLOW, BLACK = "#D55E00", "#F0E442", "#000000"
PALETTE = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY]

FAMILIES = {  # a backend's name: what people call it, its colour; charts list them in this order
    "pytorch": ("PyTorch", BLUE),
    "torch-compile": ("torch.compile", SKY),
    "onnx": ("ONNX Runtime", ORANGE),
    "openvino": ("OpenVINO", VERMILION),
    "torch-tensorrt": ("Torch-TensorRT", PURPLE),
    "tensorrt": ("TensorRT", GREEN),
}
EXTRAS = {  # a word in a variant's name: in a list, in a sentence
    "graph": ("CUDA graph", "a CUDA graph"),
    "static": ("static shapes", "static shapes"),
    "nhwc": ("NHWC", "the NHWC layout"),
    "channels last": ("channels last", "the channels-last layout"),
}
PRECISIONS = {"fp32", "tf32", "fp16", "bf16", "int8", "fp8"}


def family(backend: str) -> str:
    """The backend that a variant belongs to: "onnx" of "onnx-nhwc-graph"."""
    found = [name for name in FAMILIES if f"{backend}-".startswith(f"{name}-")]
    return max(found, key=len, default=backend)


def parts(backend: str, precision: str) -> tuple[str, str, list[str]]:
    """("TensorRT", "FP16", ["static", "graph"]); a precision in the backend's name comes first."""
    base = family(backend)
    words = backend[len(base) :].replace("channels-last", "channels last").split("-")[1:]
    precision = next((word for word in words if word in PRECISIONS), precision).upper()
    called = FAMILIES[base][0] if base in FAMILIES else base
    return called, precision, [word for word in words if word not in PRECISIONS]


def label(row) -> str:
    """What a list calls a row's method: "TensorRT FP16, static shapes, CUDA graph"."""
    called, precision, extras = parts(row.backend, row.precision)
    return ", ".join([f"{called} {precision}".strip(), *(EXTRAS.get(word, (word,))[0] for word in extras)])


def in_words(row) -> str:
    """As a sentence says it: "TensorRT FP16 with static shapes and a CUDA graph"."""
    called, precision, extras = parts(row.backend, row.precision)
    shown = [EXTRAS.get(word, (word, word))[1] for word in extras]
    return f"{called} {precision}".strip() + (f" with {' and '.join(shown)}" if shown else "")
