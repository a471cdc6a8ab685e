"""A user's turn as tokens, through the chat template of a model that others trained."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jinja2  # noqa: F401  # A missing package is reported before anything is rendered.
from tokenizers import AddedToken, Tokenizer

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.pretrained.decoder import Pretrained
from retro_np.retrieval.vocabulary import vocabulary

RENDERER = Path(__file__).with_name("chat_render.py")
SECONDS_TO_WAIT = 20  # The renderer limits its own time too, but not on Windows.
PRIVATE, LAST = 0xF0000, 0x10FFFD  # characters that no text has a meaning for: Unicode's private planes


def chat_tokens(model: Pretrained, text: str) -> list[int]:
    """The token ids of one turn of a user, up to where the model's answer begins.

    text: what the user says. Where it spells a special token, it is encoded as plain text; the template's own special
    tokens are encoded as such. A Unigram or WordPiece model may itself make a special token from such a text, which is
    therefore cut after its first character. Raises UserError if the model has no template, or if that gives no tokens,
    fails or takes too much."""
    added = model.tokenizer.get_added_tokens_decoder().items()
    special = {token.content: (number, token) for number, token in added if token.special}
    spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    unused = (c for c in map(chr, range(PRIVATE, LAST)) if c not in f"{text}{model.chat_template}")
    # While the template is rendered, one character stands for each special token that the user spells.
    plain = {content: next(unused) for content in set(spelled.findall(text))}
    rendered = render(model, [{"role": "user", "content": spelled.sub(lambda match: plain[match[0]], text)}])
    # For the tokenizer, one stands for each of the template's special tokens, as an added token that is not special.
    own = {content: next(unused) for content in set(spelled.findall(rendered))}
    marked = spelled.sub(lambda match: own[match[0]], rendered)
    pieces, cut = vocabulary(model.tokenizer).pieces, next(unused)
    for content, character in plain.items():
        made = pieces[special[content][0]] == content.encode()
        marked = marked.replace(character, f"{content[0]}{cut}{content[1:]}" if made else content)
    tokenizer, ids = Tokenizer.from_str(model.tokenizer.to_str()), {}
    tokenizer.encode_special_tokens = True
    for content, character in own.items():
        number, token = special[content]
        token.content, token.special = character, False
        tokenizer.add_tokens([token])
        ids[tokenizer.token_to_id(character)] = number
    tokenizer.add_tokens([AddedToken(cut, normalized=False)])
    encoded, cut_id = tokenizer.encode(marked, add_special_tokens=False).ids, tokenizer.token_to_id(cut)
    if not (tokens := [ids.get(i, i) for i in encoded if i != cut_id]):
        raise UserError(f"the chat template of {model.name} gives no text: leave out --chat, or use another model")
    return tokens


def render(model: Pretrained, messages: list[dict[str, str]]) -> str:
    """The text of a conversation, up to where the model's answer begins. Rendered in a process of its own.

    messages: dicts with "role" and "content". Raises UserError as `chat_tokens` does."""
    if model.chat_template is None:
        raise UserError(f"{model.name} has no chat template: leave out --chat")
    context = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **model.special}
    request = json.dumps({"template": model.chat_template, "context": context})
    command = [sys.executable, "-P", str(RENDERER)]  # -P: nothing beside the file is imported
    with reporting(f"the chat template of {model.name} fails", "leave out --chat, or use another model"):
        child = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS_TO_WAIT)
        if not child.stdout:  # The renderer was ended by a limit.
            raise ValueError("it needs too much time or memory")
        if "fault" in (answer := json.loads(child.stdout)):
            raise ValueError(answer["fault"])
        return str(answer["text"])
