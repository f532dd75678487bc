"""Small tokenizers of the families that chat models use, made on the spot."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]
# Added tokens that are no special ones: a mark that templates write, and text like any other.
ADDED = ["<think>", "</think>", "   ", "\n\n", "<h1>"]
CORPUS = [
    "You are Hamlet. What is rain? The assistant says <s> </s>, user and model.",
    "Why?\n\nBecause   <|end|>.",
] * 9


def byte_level() -> Tokenizer:
    """Like Llama 3's and Qwen's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return made


def unigram() -> Tokenizer:
    """Like T5's, whose vocabulary holds the special tokens as pieces that a text could be cut into."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"))
    return made


def sentencepiece() -> Tokenizer:
    """Like Llama 2's: a blank put before every stretch between special tokens, merges that spell special tokens."""
    letters = sorted(set("".join(CORPUS)) | {"▁"})
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *letters, "s>", "/s>", "▁▁", "▁W", "hat"[1:], "hat"]
    merges = [("s", ">"), ("<", "s>"), ("/", "s>"), ("<", "/s>"), ("▁", "▁"), ("▁", "W"), ("a", "t"), ("h", "at")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def whole_words() -> Tokenizer:
    """Its text is folded before it is looked at, wide letters and case, and its special tokens match what comes out."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|<\S*?>"), "isolated")
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    return made


KINDS = {f.__name__: f for f in (byte_level, unigram, sentencepiece, whole_words)}


def family_tokenizer(kind: str, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, its tokens added; adds_bos: `<s>` before every text, as Llama's do."""
    made = KINDS[kind]()
    folded = kind == "whole_words"
    made.add_special_tokens([AddedToken(t, special=True, normalized=folded, rstrip=t == "<|end|>") for t in SPECIAL])
    made.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    if adds_bos:
        bos = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
