"""Text to token windows: every token is text, nothing is padded, and bad files are refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from codequant.calibration import consecutive_windows, content_hash, read_documents, token_stream, windows
from codequant.data import DEMO_CALIBRATION, DEMO_HELDOUT, DEMO_MODEL
from codequant.errors import InputError

EOS = 7


class CharacterTokenizer:
    """One token per character, its code point; it has an end-of-sequence token and would add a BOS if allowed to."""

    eos_token_id: int | None = EOS

    def __call__(self, documents: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * add_special_tokens + [ord(c) for c in text] for text in documents]}


@pytest.fixture
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


def write(folder: Path, content: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    text = "\ufefffirst\n\nstill first\n\n\n\nsecond é\n\n\n \n\n\nthird\n"
    expected = ["first\n\nstill first", "second é", "third"]
    assert read_documents(write(tmp_path, text)) == expected
    assert read_documents(str(write(tmp_path, text.replace("\n", "\r\n")))) == expected


def test_documents_of_a_jsonl_file(tmp_path: Path) -> None:
    texts = ["one\n\n\nstill one", "line\u2028separator"]
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts)
    assert read_documents(write(tmp_path, lines, "text.jsonl")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "no text"),
        ("blank.txt", " \n\n\n\n\t\n", "no text"),
        ("empty.jsonl", "\n", "no text"),
        ("latin1.txt", "caf\xe9".encode("latin-1"), "byte 3 is not UTF-8"),
        ("broken.jsonl", '{"text": "fine"}\n\n{"text": ', "line 3: Expecting value"),
        ("key.jsonl", '{"text": "fine"}\n{"txt": "a"}', "line 2: no 'text' string"),
        ("type.jsonl", '{"text": 3}', "line 1: no 'text' string"),
        ("list.jsonl", '["text"]', "line 1: no 'text' string"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_documents(write(tmp_path, content, name))
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt: No such file"):
        read_documents(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="Is a directory"):
        read_documents(tmp_path)


def test_stream_is_the_text_with_an_end_behind_each_document(tokenizer: CharacterTokenizer) -> None:
    stream, ends = token_stream(["ab", "c"], tokenizer)
    assert stream.tolist() == [97, 98, EOS, 99, EOS] and ends.tolist() == [3, 5]
    tokenizer.eos_token_id = None
    stream, ends = token_stream(["ab", "c"], tokenizer)
    assert stream.tolist() == [97, 98, 99] and ends.tolist() == [2, 3]


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_consecutive_windows_are_the_stream(tokenizer: CharacterTokenizer, length: int) -> None:
    cut = consecutive_windows(["abc", "d"], tokenizer, length)
    stream = [97, 98, 99, EOS, 100, EOS]
    assert cut.dtype == torch.int64 and cut.shape == (6 // length, length)
    assert cut.flatten().tolist() == stream[: 6 // length * length]


def test_too_little_text_says_how_much_there_is(tokenizer: CharacterTokenizer) -> None:
    for function in (consecutive_windows, lambda d, t, length: windows(d, t, 1, length)):
        with pytest.raises(InputError, match="text: 6 tokens, expected at least 7"):
            function(["abc", "d"], tokenizer, 7)


def test_windows_are_spread_over_documents(tokenizer: CharacterTokenizer) -> None:
    # Documents a..e hold 5, 1, 9, 2 and 3 windows of 4 tokens, cut exactly at their ends.
    documents = [c * (4 * n - 1) for c, n in zip("abcde", [5, 1, 9, 2, 3], strict=True)]
    chosen = windows(documents, tokenizer, count=8, length=4, seed=3)
    owner = [chr(row[0]) for row in chosen.tolist()]
    assert sorted(owner[:5]) == list("abcde")  # one of each before a second of any
    assert len(set(owner[5:8])) == 3
    everything = windows(documents, tokenizer, count=20, length=4)
    whole = consecutive_windows(documents, tokenizer, 4)
    assert sorted(everything.tolist()) == sorted(whole.tolist())  # no window twice, none left out


def test_windows_depend_on_the_seed_alone(tokenizer: CharacterTokenizer) -> None:
    documents = ["".join(map(chr, range(200 + 50 * i, 250 + 50 * i))) for i in range(9)]
    first, again, other = (windows(documents, tokenizer, 6, 7, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert content_hash(first) == content_hash(again) != content_hash(other)
    assert content_hash(first) != content_hash(first.view(7, 6))


def test_fewer_windows_than_asked_for_are_announced(
    tokenizer: CharacterTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert windows(["abcdefg"], tokenizer, count=3, length=4).shape == (2, 4)
    assert "2 windows of 4 tokens, fewer than the 3" in caplog.text


def test_demo_text_and_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    calibration, heldout = read_documents(DEMO_CALIBRATION), read_documents(DEMO_HELDOUT)
    assert (len(calibration), len(heldout)) == (50, 40)
    assert not set(calibration) & set(heldout)
    chosen = windows(calibration, tokenizer, count=32, length=512)
    assert chosen.shape == (32, 512) and int(chosen.min()) >= 0 and int(chosen.max()) < 8192
    assert tokenizer.pad_token_id not in chosen
    pieces = [piece.strip("\ufffd") for row in chosen for piece in tokenizer.decode(row).split("<|endoftext|>")]
    assert all(any(piece in document for document in calibration) for piece in pieces)
