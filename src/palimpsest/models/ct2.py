"""Reader of CTranslate2 model files, and the mapping of a CTranslate2 Whisper to Hugging Face's names.

File layout (little-endian, binary version 6; strings are a uint16 length that counts the closing NUL, then the bytes):

    uint32 version · string spec · uint32 revision · uint32 n_variables
    n_variables × [string name · uint8 rank · uint32 shape[rank] · uint8 dtype · uint32 n_bytes · raw data]
    uint32 n_aliases · n_aliases × [string alias · string name]

Source: CTranslate2's documented model specification; checked against CTranslate2's own encoder output in the tests.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from palimpsest.files import UserError

VERSION = 6
DTYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

Variables = dict[str, npt.NDArray[Any]]


def read_model(data: bytes, origin: str) -> tuple[str, Variables]:
    """The spec's name (e.g. "WhisperSpec") and every variable by name, aliases resolved.

    Raises UserError when `data` (the file called `origin`) is of another version or cut short.
    """
    offset = 0

    def take(fmt: str) -> Any:
        nonlocal offset
        (value,) = struct.unpack_from("<" + fmt, data, offset)
        offset += struct.calcsize("<" + fmt)
        return value

    def take_string() -> str:
        nonlocal offset
        length = take("H")
        raw = data[offset : offset + length]
        offset += length
        if offset > len(data):
            raise ValueError("it ends inside a name")
        return raw.rstrip(b"\0").decode()

    variables: Variables = {}
    try:
        version = take("I")
        if version != VERSION:
            raise UserError(
                f"{origin} is a CTranslate2 file of version {version}; this reader knows version {VERSION}."
            )
        spec = take_string()
        take("I")  # revision of the spec
        for _ in range(take("I")):
            name = take_string()
            shape = [take("I") for _ in range(take("B"))]
            dtype = np.dtype(DTYPES[take("B")])
            n_bytes = take("I")
            variables[name] = np.frombuffer(data, dtype, n_bytes // dtype.itemsize, offset).reshape(shape)
            offset += n_bytes
        for _ in range(take("I")):
            alias = take_string()
            variables[alias] = variables[take_string()]
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{origin} is not a whole CTranslate2 model ({error}); install its package again.") from error
    return spec, variables


# Hugging Face name → CTranslate2 name inside one attention block; CTranslate2 fuses q, k, v (self) and k, v (cross).
def whisper_state_dict(variables: Variables) -> Variables:
    """float32 state dict of `WhisperForConditionalGeneration` from the variables of a WhisperSpec file."""
    state: Variables = {}
    d_model = variables["encoder/layer_norm/gamma"].shape[0]

    def put(name: str, value: npt.NDArray[Any]) -> None:
        state["model." + name] = value.astype(np.float32)

    def linear(target: str, source: str, rows: slice = slice(None)) -> None:
        put(f"{target}.weight", variables[f"{source}/weight"][rows])
        # Whisper's key projections have no bias: CTranslate2 stores zeros for them, Hugging Face nothing.
        if not target.endswith("k_proj"):
            put(f"{target}.bias", variables[f"{source}/bias"][rows])

    def norm(target: str, source: str) -> None:
        put(f"{target}.weight", variables[f"{source}/gamma"])
        put(f"{target}.bias", variables[f"{source}/beta"])

    def thirds(i: int) -> slice:
        return slice(i * d_model, (i + 1) * d_model)

    def self_attention(target: str, source: str) -> None:
        norm(f"{target}.self_attn_layer_norm", f"{source}/layer_norm")
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            linear(f"{target}.self_attn.{part}", f"{source}/linear_0", thirds(i))
        linear(f"{target}.self_attn.out_proj", f"{source}/linear_1")

    def cross_attention(target: str, source: str) -> None:
        norm(f"{target}.encoder_attn_layer_norm", f"{source}/layer_norm")
        linear(f"{target}.encoder_attn.q_proj", f"{source}/linear_0")
        for i, part in enumerate(("k_proj", "v_proj")):
            linear(f"{target}.encoder_attn.{part}", f"{source}/linear_1", thirds(i))
        linear(f"{target}.encoder_attn.out_proj", f"{source}/linear_2")

    def feed_forward(target: str, source: str) -> None:
        norm(f"{target}.final_layer_norm", f"{source}/layer_norm")
        linear(f"{target}.fc1", f"{source}/linear_0")
        linear(f"{target}.fc2", f"{source}/linear_1")

    for stack in ("encoder", "decoder"):
        for layer in range(n_layers(variables, stack)):
            target, source = f"{stack}.layers.{layer}", f"{stack}/layer_{layer}"
            self_attention(target, f"{source}/self_attention")
            if stack == "decoder":
                cross_attention(target, f"{source}/attention")
            feed_forward(target, f"{source}/ffn")
        norm(f"{stack}.layer_norm", f"{stack}/layer_norm")
        put(f"{stack}.embed_positions.weight", variables[f"{stack}/position_encodings/encodings"])
    for conv in ("conv1", "conv2"):
        put(f"encoder.{conv}.weight", variables[f"encoder/{conv}/weight"])
        put(f"encoder.{conv}.bias", variables[f"encoder/{conv}/bias"])
    put("decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]  # tied
    return state


def n_layers(variables: Variables, stack: str) -> int:
    prefix = f"{stack}/layer_"
    return 1 + max(
        int(name[len(prefix) :].split("/")[0])
        for name in variables
        if name.startswith(prefix) and name[len(prefix)].isdigit()
    )
