"""The code of a model card for a head that scores rows."""

from __future__ import annotations

from qlora_cli.data.formats import Labelled
from qlora_cli.models.heads import config_settings
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import HeadSpec

_TEXT = "The food was cold."
_TURNS = (
    'messages = [{"role": "user", "content": "What is the capital of France?"},',
    '            {"role": "assistant", "content": "Paris."}]',
    'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)',
)


def head_arguments(head: HeadSpec) -> list[str]:
    """Return the arguments with which transformers gives a base the head of a run."""
    return [f"{name}={value!r}" for name, value in config_settings(head).items()]


def score_code(recipe: Recipe, head: HeadSpec) -> list[str]:
    """Return lines that score a row in the form of the training rows."""
    formats = [source.format for source in recipe.data.train_sources]
    is_text = all(isinstance(one, Labelled) and not one.as_chat for one in formats)
    inputs = [
        f'text = "{_TEXT}" + tokenizer.eos_token  # as in training, where it ends each row',
        'inputs = tokenizer(text, return_tensors="pt")',
    ]
    scores = {
        "single": "outputs.softmax(-1)[0].tolist()",
        "multi": "outputs.sigmoid()[0].tolist()",
        "regression": "outputs[0].tolist()",
    }[head.problem]
    return [
        "model.config.pad_token_id = tokenizer.pad_token_id",
        "",
        *(inputs if is_text else _TURNS),
        "with torch.no_grad():",
        "    outputs = model.eval()(**inputs.to(model.device)).logits.float()",
        f"print(dict(zip(model.config.id2label.values(), {scores})))",
    ]
