"""Block keys name everything that decides a block's content, and nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.kv.keys import KEY_BYTES, NOBODY, block_keys, prompt_key, root_key, tenant_of

ROOT = root_key("f" * 32, "")
KNOWN = ["38455f241d7cafd7a3164d20025bde7dc9ac0caf5ebce148", "38455f241d7cafd70b3f0b2510c629b6d96595c4969fdbf0"]
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_roots_differ_by_fingerprint_and_by_salt() -> None:
    roots = {root_key(fingerprint, salt) for fingerprint in ("a" * 32, "b" * 32) for salt in ("", "x", "y")}
    assert len(roots) == 6
    assert {len(root) for root in roots} == {KEY_BYTES}


def test_keys_say_whose_they_are_and_nothing_of_the_salt() -> None:
    tags = {salt: tenant_of(root_key("a" * 32, salt)) for salt in ("", "x", "y")}
    assert tags[""] == NOBODY
    assert len(set(tags.values())) == 3
    for salt, tag in tags.items():
        assert {tenant_of(key) for key in block_keys(root_key("a" * 32, salt), range(64), 16)} == {tag}
    assert tenant_of(root_key("b" * 32, "x")) != tags["x"]


def test_prompts_have_names_by_all_that_decides_their_blocks() -> None:
    prompts = [[], [1], [1, 2], [2, 1], [1, 2, 0], list(range(40)), list(range(41))]
    names = {
        prompt_key(fingerprint, salt, prompt) for fingerprint in ("a", "b") for salt in ("", "x") for prompt in prompts
    }
    assert len(names) == 4 * len(prompts)
    assert prompt_key("a", "", [1, 2]) == prompt_key("a", "", (1, 2))


def test_keys_are_the_same_in_every_process() -> None:
    """Other processes, and files on a disk, will know these blocks by these names."""
    keys = block_keys(root_key("00" * 16, "salt"), [1, 2, 3, 2**32 - 1], 2)
    assert [key.hex() for key in keys] == KNOWN


def test_only_full_blocks_have_keys() -> None:
    assert [len(block_keys(ROOT, list(range(count)), 4)) for count in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]


@settings(deadline=None, max_examples=50)
@given(TOKENS, st.integers(1, 5), st.integers(0, 40))
def test_keys_chain(tokens: list[int], block_tokens: int, cut: int) -> None:
    """Keys of a prefix are a prefix of the keys, and the rest can be named from where the prefix ends."""
    keys = block_keys(ROOT, tokens, block_tokens)
    blocks = min(cut, len(keys))
    before = block_keys(ROOT, tokens[: blocks * block_tokens], block_tokens)
    assert before == keys[:blocks]
    parent = before[-1] if before else ROOT
    assert block_keys(parent, tokens[blocks * block_tokens :], block_tokens) == keys[blocks:]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.data())
def test_a_changed_token_changes_its_block_and_all_after(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    keys, others = block_keys(ROOT, tokens, 3), block_keys(ROOT, changed, 3)
    assert keys[: at // 3] == others[: at // 3]
    assert not set(keys[at // 3 :]) & set(others[at // 3 :])


def test_equal_blocks_at_other_places_have_other_keys() -> None:
    assert len(set(block_keys(ROOT, [7] * 12, 3))) == 4


@pytest.mark.parametrize("token", [-1, 2**32])
def test_ids_out_of_range_are_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        block_keys(ROOT, [token], 1)
