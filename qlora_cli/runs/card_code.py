"""The code of a model card: load the weights as in training, and generate or score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from qlora_cli.adapters.bottleneck import Bottleneck
from qlora_cli.adapters.partial import TRAINED
from qlora_cli.data.formats import TemplateFormat, is_verbatim
from qlora_cli.data.prompts import PromptReader
from qlora_cli.data.sources.files import names_a_file
from qlora_cli.data.sources.hub import is_hub_id
from qlora_cli.models.heads import CAUSAL_LM, head_kind
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.card_head import head_arguments, score_code
from qlora_cli.types import HeadSpec, Message

Precision = Literal["auto", "bf16", "fp16", "fp32"]

_QUESTION = "What is the capital of France?"
_TOOLS = (
    "tools = [  # your functions, declared as in the training rows",
    '    {"type": "function", "function": {',
    '        "name": "get_capital", "description": "Look up the capital of a country.",',
    '        "parameters": {',
    '            "type": "object", "properties": {"country": {"type": "string"}},',
    '            "required": ["country"],',
    "        },",
    "    }},",
    "]",
)
_CONFIG_KEYS = {
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold",
}  # fmt: skip


def card_code(
    recipe: Recipe,
    name: str,
    *,
    is_whole: bool,
    has_tools: bool = False,
    precision: Precision | None = None,
) -> list[str]:
    """Return lines that load the weights of a run, and generate an answer or score a row.

    Args:
        name: the folder of the weights.
        is_whole: the folder holds a whole model; otherwise it needs the base.
        has_tools: training rows declare tools.
        precision: what the run computed in; None takes the recipe's.
    """
    head = recipe.objective.head
    load = _load_whole(head)
    if not is_whole:
        load = _load_on_base(recipe, precision or recipe.training.precision)
    imports = [line for line in load if line.startswith(("from ", "import "))]
    rest = load[len(imports) :]
    return [
        *imports,
        "",
        f"folder = {_text(name)}  # the folder of this card, or its id on the Hub",
        *rest,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *(
            ["", *_generate(recipe, has_tools=has_tools)]
            if head is None
            else score_code(recipe, head)
        ),
    ]


def is_on_hub(path: str) -> bool:
    """Return whether a path is the id of something on the Hub, and not a local file or folder."""
    here = Path(path)
    is_file = names_a_file(path) or here.suffix == ".gguf"
    return is_hub_id(path) and not is_file and not here.exists()


def public(path: str) -> str:
    """Return a path without its folders; Hub ids are kept."""
    return path if is_on_hub(path) else Path(path).name


def _load_whole(head: HeadSpec | None) -> list[str]:
    if head is not None:
        name = head_kind(head).auto_class_name
        return [
            "import torch",
            f"from transformers import {name}, AutoTokenizer",
            f'model = {name}.from_pretrained(folder, dtype="auto")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
    ]


def _load_on_base(recipe: Recipe, precision: Precision) -> list[str]:
    """Load the base as in training: the adapter was trained on exactly those weights."""
    head = recipe.objective.head
    auto_class = head_kind(head).auto_class_name
    names = ["AutoTokenizer"] if head else ["AutoTokenizer", "GenerationConfig", "TextStreamer"]
    arguments = _base_arguments(recipe, precision)
    if head is not None:
        arguments += head_arguments(head)
    if any("BitsAndBytesConfig" in argument for argument in arguments):
        names.append("BitsAndBytesConfig")
    path = public(recipe.model.path)
    unpack, note = [], "" if is_on_hub(recipe.model.path) else "  # the path of your copy"
    if path.endswith(".gguf"):
        names += ["GgufConfig", *([CAUSAL_LM.auto_class_name] if head else [])]
        file, path, note = path, f"{path.removesuffix('.gguf')}-bfloat16", ""
        unpack = [
            f"# Put {file} alone into a folder: other files there would change how it is read.",
            "AutoModelForCausalLM.from_pretrained(",
            f'    "gguf", gguf_file={_text(file)}, dtype="bfloat16",',
            "    quantization_config=GgufConfig(dequantize=True),",
            f").save_pretrained({_text(path)})",
        ]
    libraries, attach = _attach(recipe)
    return [
        *(["import torch"] if head else []),
        *libraries,
        f"from transformers import {auto_class}, {', '.join(sorted(names))}",
        *unpack,
        f"base = {auto_class}.from_pretrained(",
        f"    {_text(path)},{note}",
        *(f"    {argument}," for argument in arguments),
        ")",
        *attach,
        *([] if head else ["model.generation_config = GenerationConfig.from_pretrained(folder)"]),
    ]


def _base_arguments(recipe: Recipe, precision: Precision) -> list[str]:
    import torch

    precisions = {"fp16": torch.float16, "fp32": torch.float32}
    dtype = precisions.get(precision, torch.bfloat16)
    options = recipe.quantization.load_options(dtype)
    arguments = [f'dtype="{str(options["dtype"]).removeprefix("torch.")}"']
    if is_on_hub(recipe.model.path) and recipe.model.revision:
        arguments.append(f"revision={_text(recipe.model.revision)}")
    if recipe.model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    if quantization := options.get("quantization_config"):
        settings = quantization.to_diff_dict()
        wanted = [f"{key}={value!r}" for key, value in settings.items() if key in _CONFIG_KEYS]
        arguments.append(f"quantization_config=BitsAndBytesConfig({', '.join(wanted)})")
    return arguments


def _attach(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the imports and the lines that put the trained weights onto the base."""
    if recipe.adapter.trains_base:
        load = f'base.load_state_dict(load_file(folder + "/{TRAINED}"), strict=False)'
        return ["from safetensors.torch import load_file"], [load, "model = base"]
    libraries, before = ["from peft import PeftModel"], []
    if isinstance(recipe.adapter, Bottleneck):
        libraries.append("from qlora_cli.adapters.layers.bottleneck import register")
        before = ["register()  # PEFT itself does not have this method"]
    return libraries, [*before, "model = PeftModel.from_pretrained(base, folder)"]


def _generate(recipe: Recipe, *, has_tools: bool) -> list[str]:
    formats = [source.format for source in recipe.data.train_sources]
    if all(map(is_verbatim, formats)):
        inputs = ['inputs = tokenizer("The capital of France is", return_tensors="pt")']
    else:
        turns = ", ".join(
            f'{{"role": {_text(m.role)}, "content": {_text(m.content)}}}'
            for m in _example_turns(recipe)
        )
        inputs = [
            *(_TOOLS if has_tools else ()),
            f"messages = [{turns}]",
            "inputs = tokenizer.apply_chat_template(",
            f"    messages,{' tools=tools,' if has_tools else ''} add_generation_prompt=True,",
            '    return_tensors="pt", return_dict=True,',
            ")",
        ]
    return [
        *inputs,
        "streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)",
        "model.generate(**inputs.to(model.device), max_new_tokens=100, streamer=streamer)",
    ]


def _example_turns(recipe: Recipe) -> list[Message]:
    """Return a question in the form of the training prompts.

    A template over several columns is shown as it is, to be filled in.
    """
    formats = [source.format for source in recipe.data.train_sources]
    first = formats[0]
    question = Message("user", _QUESTION, train=False)
    if any(format != first for format in formats):
        return [question]
    if isinstance(first, TemplateFormat) and len(first.prompt_columns) != 1:
        system = first.fixed_system()
        before = [] if system is None else [Message("system", system, train=False)]
        return [*before, Message("user", first.user, train=False)]
    return PromptReader(formats).conversation([question])


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
