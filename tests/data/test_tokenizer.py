"""Tokenizers: ids, round trips, fingerprints, and the errors for specs that cannot work."""

import base64
import builtins
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megakda.data.tokenizer import DEFAULT_TIKTOKEN_PATTERN, Tokenizer, load_tokenizer
from megakda.errors import DataError

TEXTS = [
    "",
    "hello world",
    "it's 12345 ÅNGSTRÖM naïve cafe\u0301 — ½",
    "你好，世界 مرحبا привет",
    "👩‍💻 \U0001f1ea\U0001f1fa",
    "tabs\tand\r\nlines\n\n\n   and blanks   ",
    "nul \x00 and \ufeff inside",
]
END = "<|endoftext|>"
KIMI_LIKE = r"[\p{Han}]+|[\p{L}&&[^\p{Han}]]+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("hf"))


def make_hf(folder, pad="<pad>", eos="<|endoftext|>", words="the cat and the hat", **state):
    tok = RustTokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<pad>"],
    )
    tok.train_from_iterator([words] * 20, trainer)
    if state.get("lowercase"):
        tok.normalizer = normalizers.Lowercase()
    if state.get("truncate"):
        tok.enable_truncation(4)
        tok.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    return folder


def make_tiktoken(folder, extra=(b"th", b"the", b" the", b"in"), config=None, name=None):
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([i]) for i in range(256)] + list(extra)
    file = folder / "tiktoken.model"
    file.write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))
    )
    if config is not None:
        (folder / (name or "tiktoken_config.json")).write_text(json.dumps(config))
    return file


@pytest.fixture(params=["byte", "hf", "tiktoken"])
def tok(request, hf_dir, tmp_path):
    if request.param == "hf":
        return load_tokenizer(f"hf:{hf_dir}")
    if request.param == "tiktoken":
        return load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path)}")
    return load_tokenizer("byte")


@pytest.mark.parametrize("text", TEXTS)
def test_roundtrip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.encode_array(text).tolist() == ids
    assert all(isinstance(i, int) and 0 <= i < tok.vocab_size for i in ids)
    assert tok.eod not in ids


def test_roundtrip_of_random_text(tok):
    rng = random.Random(7)
    ranges = [(32, 127), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(50):
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 80)))
        assert tok.decode(tok.encode(text)) == text


def test_protocol(tok):
    assert isinstance(tok, Tokenizer)
    assert tok.spec.split(":")[0] in ("byte", "hf", "tiktoken")
    assert 0 <= tok.eod < tok.vocab_size
    assert tok.pad == -1 or 0 <= tok.pad < tok.vocab_size
    json.dumps(tok.unique_identifiers)
    again = load_tokenizer(tok.spec)
    assert again.fingerprint == tok.fingerprint
    assert again.unique_identifiers == tok.unique_identifiers


def test_special_tokens_in_text_are_text(tok):
    text = "a <|endoftext|> b <pad> <|endofdocument|>"
    ids = tok.encode(text)
    assert tok.eod not in ids and tok.pad not in ids
    assert tok.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_encode_with_special_is_encode_where_nothing_is_spelled(tok, text):
    assert tok.encode_with_special(text) == tok.encode(text)
    assert tok.encode_with_special(f"{text}\ud800") == tok.encode(f"{text}?")


def test_decode_leaves_specials_out_and_survives_anything(tok):
    ids = tok.encode("ab")
    assert tok.decode([ids[0], tok.eod, *ids[1:], tok.eod]) == "ab"
    assert isinstance(tok.decode([tok.vocab_size + 5, *ids]), str)
    broken = tok.encode("é")[:1]
    assert "\ufffd" in tok.decode(broken)


def test_lone_surrogates_do_not_fail(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a?b"


def test_byte_ids():
    tok = load_tokenizer("byte")
    assert (tok.vocab_size, tok.eod, tok.pad) == (257, 256, -1)
    assert tok.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert tok.decode([0xFF, 97, 256, 300]) == "\ufffda\ufffd"
    assert tok.decode([]) == ""
    assert tok.encode_with_special("<|endofdocument|>") == list(b"<|endofdocument|>")
    assert tok.chat_template() is None
    assert pickle.loads(pickle.dumps(tok)).fingerprint == tok.fingerprint


# --- Hugging Face ---------------------------------------------------------------------------------


def test_hf_ids(hf_dir):
    reference = RustTokenizer.from_file(str(hf_dir / "tokenizer.json"))
    tok = load_tokenizer(f"hf:{hf_dir}")
    assert tok.encode("the cat") == reference.encode("the cat").ids
    assert tok.vocab_size == reference.get_vocab_size()
    assert (tok.eod, tok.pad) == (0, 1)


def test_hf_ignores_saved_truncation_and_padding(tmp_path):
    tok = load_tokenizer(f"hf:{make_hf(tmp_path, truncate=True)}")
    assert tok.decode(tok.encode("x" * 100)) == "x" * 100
    assert len(tok.encode("x")) == 1


def test_hf_special_tokens(tmp_path):
    folder = make_hf(tmp_path, truncate=True)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    rust.post_processor = processors.TemplateProcessing(f"{END} $A", None, [(END, 0)])
    rust.save(str(folder / "tokenizer.json"))
    tok = load_tokenizer(f"hf:{folder}")
    before = tok.encode(f"the{END}cat<pad>")
    # Nothing is added in front, and nothing cut off or padded.
    expected = [*tok.encode("the"), 0, *tok.encode("cat"), 1]
    assert tok.encode_with_special(f"the{END}cat<pad>") == expected
    assert tok.encode(f"the{END}cat<pad>") == before and not {0, 1} & set(before)
    assert tok.special_names() == {"eos_token": END, "pad_token": "<pad>"}


def test_hf_modes_do_not_meet_in_threads(hf_dir):
    tok = load_tokenizer(f"hf:{hf_dir}")
    texts = [f"the {END} cat {number}" for number in range(400)]
    ordinary = [tok.encode(text) for text in texts]
    special = [tok.encode_with_special(text) for text in texts]
    assert all(0 not in a and b.count(0) == 1 for a, b in zip(ordinary, special, strict=True))
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(lambda: [tok.encode(t) for t in texts]) for _ in range(2)]
        runs += [pool.submit(lambda: [tok.encode_with_special(t) for t in texts]) for _ in range(2)]
        assert [run.result() for run in runs] == [ordinary, ordinary, special, special]


def test_hf_tokenizer_in_python(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    tok = load_tokenizer(f"hf:{tmp_path}")
    a, b = tok.encode("a")[0], tok.encode("b")[0]
    assert tok.encode_with_special("a</s>b") == [a, 1, b] and 1 not in tok.encode("a</s>b")


def test_hf_chat_template(tmp_path):
    folder = make_hf(tmp_path)
    assert load_tokenizer(f"hf:{folder}").chat_template() is None
    (folder / "chat_template.jinja").write_text("one")
    assert load_tokenizer(f"hf:{folder}").chat_template() == "one"
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for names, expected in ((["rag", "default"], "default"), (["rag", "tool_use"], None)):
        config["chat_template"] = [{"name": name, "template": name} for name in names]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(f"hf:{folder}").chat_template() == expected


def test_hf_padding_that_is_the_document_end_is_no_padding(tmp_path):
    assert load_tokenizer(f"hf:{make_hf(tmp_path, pad='<|endoftext|>')}").pad == -1
    assert load_tokenizer(f"hf:{make_hf(tmp_path / 'none', pad=None)}").pad == -1


def test_hf_fingerprint_is_of_the_ids(hf_dir, tmp_path):
    base = load_tokenizer(f"hf:{hf_dir}").fingerprint
    copy = make_hf(tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ x }}"}))
    data = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(data, indent=3))
    assert load_tokenizer(f"hf:{copy}").fingerprint == base
    others = {
        load_tokenizer(f"hf:{make_hf(tmp_path / 'words', words='dog dog dogs')}").fingerprint,
        load_tokenizer(f"hf:{make_hf(tmp_path / 'eos', eos='<pad>')}").fingerprint,
        load_tokenizer(f"hf:{make_hf(tmp_path / 'norm', lowercase=True)}").fingerprint,
    }
    assert len(others | {base}) == 4


def test_hf_errors(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"gpt2 is not a folder.*data\.tokenizer"):
        load_tokenizer("hf:gpt2")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"cannot load .*holds nothing"):
        load_tokenizer(f"hf:{empty}")
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(f"hf:{make_hf(tmp_path / 'no_eos', eos=None)}")
    make_tiktoken(tmp_path / "kimi", config=KIMI_CONFIG, name="tokenizer_config.json")
    with pytest.raises(DataError, match="tiktoken:FILE"):
        load_tokenizer(f"hf:{tmp_path / 'kimi'}")

    real = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    with pytest.raises(DataError, match=r"pip install megakda\[hf\]"):
        load_tokenizer(f"hf:{empty}")


# --- tiktoken -------------------------------------------------------------------------------------

KIMI_CONFIG = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "added_tokens_decoder": {
        "260": {"content": "[BOS]", "special": True},
        "261": {"content": "[EOS]", "special": True},
        "270": {"content": "[PAD]", "special": True},
    },
    "eos_token": "[EOS]",
    "pad_token": {"content": "[PAD]"},
}


def test_tiktoken_defaults(tmp_path):
    tok = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path)}")
    assert (tok.vocab_size, tok.eod, tok.pad) == (261, 260, -1)
    assert tok.encode("the the in") == [257, 258, 32, 259]
    assert DEFAULT_TIKTOKEN_PATTERN.count("|(?i:") == 0 and "{1,3}" in DEFAULT_TIKTOKEN_PATTERN


def test_tiktoken_config(tmp_path):
    config = {
        "pattern": ".",  # single characters, so nothing can merge
        "special_tokens": {"<eod>": 300, "<pad>": 301},
        "eod_token": "<eod>",
        "pad_token": "<pad>",
    }
    tok = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path, config=config)}")
    assert (tok.vocab_size, tok.eod, tok.pad) == (302, 300, 301)
    assert tok.encode("the") == list(b"the")
    assert tok.decode([300, 299, 97]) == "\ufffda"
    plain = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path / 'plain')}")
    assert plain.fingerprint != tok.fingerprint


def test_tiktoken_pattern_out_of_a_python_module_that_is_not_run(tmp_path):
    file = make_tiktoken(
        tmp_path, (b"th", b"the", "好".encode()[:2]), KIMI_CONFIG, "tokenizer_config.json"
    )
    (tmp_path / "tokenization_kimi.py").write_text(
        "raise SystemExit('was run')\n"
        "class TikTokenTokenizer:\n"
        f"    pat_str = '|'.join([r'''[\\p{{Han}}]+''', {KIMI_LIKE.split('|', 1)[1]!r}])\n"
    )
    tok = load_tokenizer(f"tiktoken:{file}")
    assert (tok.vocab_size, tok.eod, tok.pad) == (271, 261, 270)
    assert tok.encode("the好")[0] == 257
    spelled = make_tiktoken(
        tmp_path / "b", (b"th", b"the", "好".encode()[:2]), {**KIMI_CONFIG, "pattern": KIMI_LIKE}
    )
    assert load_tokenizer(f"tiktoken:{spelled}").fingerprint == tok.fingerprint


def test_tiktoken_long_runs(tmp_path):
    tok = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path)}")
    for text in [" " * 1_000_000, "^" * 200_000, "x" + " " * 60_000 + "the" + "=" * 26_000 + "\n"]:
        assert tok.decode(tok.encode(text)) == text
    words = "the cat in the hat\n" * 5_000
    assert tok.encode(words) == tok._enc.encode_ordinary(words)


def test_tiktoken_special_tokens(tmp_path):
    names = {"<a>": 300, "<a>the": 301, "[EOS]": 302, "|": 303, "": 304}
    config = {"special_tokens": names, "eos_token": "[EOS]", "bos_token": {"content": "<a>"}}
    tok = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path, config=config)}")
    assert tok.encode_with_special("the<a> the<a>the|[EOS]") == [257, 300, 258, 301, 303, 302]
    assert tok.encode("<a>the") == [*b"<a>", 257]
    assert tok.special_names() == {"eos_token": "[EOS]", "bos_token": "<a>"}
    # Inside a run that is cut because of its length, one is found wherever it is.
    text = "x" * 24_998 + "[EOS]" + "y" * 30_000
    ids = tok.encode_with_special(text)
    assert ids.count(302) == 1 and len(ids) == len(text) - 4
    config["special_tokens"] = {"[EOS]": 302, "<b>": 303}
    tok = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path, config=config)}")
    with pytest.raises(DataError, match=r"bos_token '<a>' beside tiktoken\.model is not one of"):
        tok.special_names()
    # Where no two begin alike, the ids are tiktoken's own.
    tok = load_tokenizer(
        f"tiktoken:{make_tiktoken(tmp_path, config=config | {'bos_token': '<b>'})}"
    )
    text = "the cat<b> in\n\n<b>[EOS] the [EOS]"
    assert tok.encode_with_special(text) == tok._enc.encode(text, allowed_special="all")


def test_tiktoken_document_end_of_its_own_is_special(tmp_path):
    tok = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path)}")
    end = tok.special_names()["eos_token"]
    assert tok.encode_with_special(f"in{end}in") == [259, tok.eod, 259]
    assert tok.chat_template() is None


def test_tiktoken_chat_template(tmp_path):
    def load(template):
        file = make_tiktoken(tmp_path, config={"chat_template": template})
        return load_tokenizer(f"tiktoken:{file}")

    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert [load(t).chat_template() for t in ("one", named, named[:1])] == ["one", "yes", None]
    for wrong in (5, ["one"], [{"name": "default"}], [{"name": "default", "template": 5}]):
        with pytest.raises(DataError, match=r"chat_template beside tiktoken\.model has an unknown"):
            load(wrong).chat_template()
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert load("one").chat_template() == "é"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"cannot read .*chat_template\.jinja"):
        load("one").chat_template()


def test_tiktoken_reads_the_file_as_it_is_now(tmp_path):
    first = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path)}")
    second = load_tokenizer(f"tiktoken:{make_tiktoken(tmp_path, (b'ab', b'abc'))}")
    assert second.vocab_size == 259 and first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pattern": "("}, "refuses the pattern"),
        ({"special_tokens": {"<a>": 5}}, "unique and outside"),
        ({"special_tokens": {"<a>": 300, "<b>": 300}}, "unique and outside"),
        ({"special_tokens": ["<a>"]}, "unknown form"),
        ({"eod_token": "<a>"}, "'<a>' beside tiktoken.model is not one of its special tokens"),
        (["x"], "not a JSON object"),
        (KIMI_CONFIG, r"tokenization_kimi\.py, which is not there"),
    ],
)
def test_tiktoken_config_errors(tmp_path, config, message):
    file = make_tiktoken(tmp_path, config=config)
    with pytest.raises(DataError, match=message):
        load_tokenizer(f"tiktoken:{file}")


def test_tiktoken_file_errors(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tiktoken rank file .*nowhere"):
        load_tokenizer(f"tiktoken:{tmp_path / 'nowhere'}")
    bad = tmp_path / "bad.tiktoken"
    bad.write_text("YQ== 0\nnot base64!\n")
    with pytest.raises(DataError, match="line 2 of"):
        load_tokenizer(f"tiktoken:{bad}")
    bad.write_text("YQ== 0\n")
    with pytest.raises(DataError, match="no token for 255 of the 256 bytes"):
        load_tokenizer(f"tiktoken:{bad}")


@pytest.mark.parametrize("spec", ["", "bytes", "byte:x", "hf", "hf:", "gpt2", "tiktoken:"])
def test_unknown_specs(spec):
    with pytest.raises(DataError, match=r"is not one of byte, hf:DIR or tiktoken:FILE: set data\."):
        load_tokenizer(spec)
