"""From conversations to the tokens a model learns: rendered by a chat template, and known which of them to learn.

read_conversations(path) -> Conversation --chat template--> text --tokenise--> Demonstration
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from megatron_orz.data.chat_template import chat_template
from megatron_orz.data.conversations import Conversation, read_conversations
from megatron_orz.types import Demonstration, LearnedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_TOKENIZER = "tokenizer"
"""The template of conversations that is the chat template of the model's tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationReport:
    """What became of the rows of all files together."""

    num_read: int
    num_kept: int
    num_too_long: int
    """Dropped: more tokens than the limit."""
    num_tokens: int
    num_learned: int
    """Of the tokens."""

    def __str__(self) -> str:
        return (
            f"{self.num_kept} conversations of {self.num_read} rows ({self.num_too_long} too long), "
            f"{self.num_tokens:,} tokens, {self.num_learned:,} of them to learn"
        )


def resolve_chat_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text that `data.template` names: the tokenizer's own, or that of a prompt template.

    Raises ValueError for a tokenizer without one, and for a template that is none.
    """
    if template != OF_TOKENIZER:
        return chat_template(template)
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            f"data.template is {OF_TOKENIZER}, but the tokenizer of the model has no chat template; set it to a "
            "built-in prompt (orz, short), or to a text that holds {problem}"
        )
    return tokenizer.chat_template


def load_demonstrations(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    learn: LearnedTokens,
    max_tokens: int,
    on_conversation: Callable[[], None] = lambda: None,
) -> tuple[list[Demonstration], ConversationReport]:
    """The conversations of the files as tokens, without those that are too long.

    template: Jinja text (`resolve_chat_template`). on_conversation: called for each one that is rendered.
    Raises ValueError for a bad row, and where nothing is left.
    """
    rendered = []
    for conversation in chain.from_iterable(map(read_conversations, paths)):
        rendered.append(_pieces(conversation, tokenizer, template))
        on_conversation()
    # All pieces in one call: tokenizers work on many texts at once.
    texts = [text for pieces in rendered for text in pieces]
    token_ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    whole = [_demonstration([next(token_ids) for _ in pieces], tokenizer.eos_token_id, learn) for pieces in rendered]
    kept = [demonstration for demonstration in whole if len(demonstration.token_ids) <= max_tokens]
    if not kept:
        raise ValueError(
            f"none of the {len(whole)} conversations of {', '.join(map(str, paths))} fits data.max_tokens "
            f"{max_tokens}; raise it"
        )
    return kept, ConversationReport(
        num_read=len(whole),
        num_kept=len(kept),
        num_too_long=len(whole) - len(kept),
        num_tokens=sum(len(demonstration.token_ids) for demonstration in kept),
        num_learned=sum(sum(demonstration.loss_mask) for demonstration in kept),
    )


def _pieces(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """The conversation's text in pieces: what comes before a response, the response, and so on in turns.

    They are tokenised apart, as a server does: it continues the tokens of a prompt, and no token reaches across.
    """
    messages: list[dict[str, Any]] = [asdict(message) for message in conversation.messages]

    def render(num_messages: int, *, is_prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages[:num_messages], chat_template=template, tokenize=False, add_generation_prompt=is_prompt
        )
        return text

    starts = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        texts = [""]
        for number in starts:
            texts += [render(number, is_prompt=True), render(number + 1, is_prompt=False)]
    except TemplateError as error:
        raise ValueError(
            f"{conversation.place}: the chat template refuses the conversation ({error}); correct or remove it, or set "
            "data.template"
        ) from error
    if not all(text.startswith(before) for before, text in pairwise(texts)):
        raise ValueError(
            f"{conversation.place}: the chat template does not write what was said before as it wrote it then, so that "
            "the model would never see it so; make a conversation of each response, or set data.template"
        )
    return [text[len(before) :] for before, text in pairwise(texts)]


def _demonstration(pieces: Sequence[list[int]], eos_id: int | None, learn: LearnedTokens) -> Demonstration:
    """pieces: token ids of prompts and responses in turns. The last response ends in the eos token."""
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    for number, piece in enumerate(pieces):
        is_response, is_last = number % 2 == 1, number == len(pieces) - 1
        if is_last and eos_id is not None and eos_id not in piece:
            piece = [*piece, eos_id]
        # Behind the token that ends a response a template may go on, with a line break for instance.
        num_learned = len(piece)
        if is_response and eos_id in piece:
            num_learned -= piece[::-1].index(eos_id)
        token_ids += piece
        loss_mask += [is_response and position < num_learned for position in range(len(piece))]
    if learn == "all":
        loss_mask = [True] * len(token_ids)
    return Demonstration(token_ids=token_ids, loss_mask=[False, *loss_mask[1:]])
