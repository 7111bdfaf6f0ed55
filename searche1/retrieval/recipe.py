"""How an encoder makes vectors: fixed when an index is built, read back when it is searched. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from searche1.types import UserError

Kind = Literal["query", "passage"]
Pooling = Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken"]  # as sentence-transformers names them

STYLES = (
    "e5 (query and passage prefixes, mean pooling), bge (query instruction, CLS pooling), plain (no prefixes, mean "
    "pooling) or sentence-transformers (what the folder's modules.json and prompts say)"
)
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # sentence-transformers takes the first that is there


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a vector. Builder and server must share it, so an index keeps it in its manifest."""

    encoder: str  # "minilm", a HuggingFace folder or a hub id
    pooling: Pooling
    query_prefix: str
    passage_prefix: str
    max_tokens: int = 256  # queries and passages alike (Search-R1)
    lower_case: bool = False  # before the tokenizer, which may do it anyway
    dense: tuple[str, ...] = ()  # folders of the layers behind the pooling, below the encoder's


def choose_recipe(name_or_folder: str, style: str = "") -> Recipe:
    """The recipe of an encoder. Only "minilm" has a style of its own: a name is not trusted to tell the prefixes."""
    match style or ("plain" if name_or_folder == "minilm" else ""):
        case "e5":
            return Recipe(name_or_folder, pooling="mean", query_prefix="query: ", passage_prefix="passage: ")
        case "bge":
            instruction = "Represent this sentence for searching relevant passages: "
            return Recipe(name_or_folder, pooling="cls", query_prefix=instruction, passage_prefix="")
        case "plain":
            return Recipe(name_or_folder, pooling="mean", query_prefix="", passage_prefix="")
        case "sentence-transformers":
            return _read_folder(Path(name_or_folder))
        case "":
            raise UserError(
                f"the encoder {name_or_folder!r} needs a style: {STYLES}; E5's own folders do not tell their prefixes"
            )
    raise UserError(f"encoder style is {style!r}; choose {STYLES}")


def _read_folder(folder: Path) -> Recipe:
    """The recipe that sentence-transformers would follow. Raises UserError where it is one that we cannot."""
    if not (folder / "modules.json").is_file():
        raise UserError(
            f"{folder} has no modules.json; give a downloaded sentence-transformers folder, or another style"
        )
    pooling: Pooling | None = None
    dense = []
    for module in read_json(folder / "modules.json"):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _read_pooling(folder / module["path"] / "config.json")
        elif kind == "Dense":
            dense.append(module["path"])
        elif kind not in ("Transformer", "Normalize"):  # all vectors get length one: the index's metric is the cosine
            raise UserError(f"{folder} has the module {module['type']!r}, which cannot be run; choose another encoder")
    if pooling is None:
        raise UserError(f"{folder} has no Pooling module, so a text has no single vector; choose another encoder")
    prompts = read_json(folder / "config_sentence_transformers.json", {})
    transformer: dict[str, Any] = next(map(read_json, sorted(folder.glob("sentence_*_config.json"))), {})
    return Recipe(
        str(folder),
        pooling=pooling,
        query_prefix=_prompt(prompts, ("query",)),
        passage_prefix=_prompt(prompts, PASSAGE_PROMPTS),
        max_tokens=transformer.get("max_seq_length") or _longest(folder),
        lower_case=bool(transformer.get("do_lower_case")),
        dense=tuple(dense),
    )


def _read_pooling(path: Path) -> Pooling:
    config = read_json(path)
    wanted = config.get("pooling_mode")
    if wanted is None:  # the older form: a switch for each
        switches = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}
        names = [key.removeprefix("pooling_mode_") for key, is_on in config.items() if "pooling_mode_" in key and is_on]
        wanted = [switches.get(name, name) for name in names]
    modes = [wanted] if isinstance(wanted, str) else list(wanted)
    if len(modes) != 1 or modes[0] not in get_args(Pooling) or not config.get("include_prompt", True):
        raise UserError(f"{path} asks for the pooling {config}, which cannot be done; choose another encoder")
    return cast(Pooling, modes[0])


def _prompt(config: dict[str, Any], names: tuple[str, ...]) -> str:
    prompts = config.get("prompts") or {}
    name = next((name for name in (*names, config.get("default_prompt_name")) if name in prompts), None)
    return prompts[name] if name is not None else ""


def _longest(folder: Path) -> int:
    """Tokens that tokenizer and model take, where nothing says how many sentence-transformers would."""
    lengths = (
        read_json(folder / "tokenizer_config.json", {}).get("model_max_length"),
        read_json(folder / "config.json", {}).get("max_position_embeddings"),
    )
    return int(min(length for length in (*lengths, 1 << 20) if length))


def read_json(path: Path, default: Any = None) -> Any:
    """What a JSON file holds, or the default if there is one and no file. Raises UserError."""
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download the encoder again") from error
