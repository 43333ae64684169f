"""A real tokenizer of a few hundred tokens."""

from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from twostroke.tokenizer import Tokenizer

EOS = "<|end|>"
_CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}" + EOS + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_CORPUS = ["The quick brown fox jumps over the lazy dog.", "hello world, hello there", "你好世界", "naïve café 🙂"]


def build_tokenizer(directory: Path, template: str | None = _CHAT_TEMPLATE) -> Tokenizer:
    """A byte-level BPE tokenizer of a few hundred tokens, saved and loaded as a model's would be."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False),
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=EOS, clean_up_tokenization_spaces=False)
    hf.chat_template = template
    hf.save_pretrained(str(directory))
    return Tokenizer.load(directory)
