"""Prompts by number: a network that reads text is trained, guided and dropped by labels."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.prompts import Prompts

CAPTIONS = ("a cat", "a dog")


def rows(count: int = 3) -> Cond:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(count, 5, 8, generator=generator)
    return Cond(text=text.half(), mask=torch.ones(count, 5, dtype=torch.bool))


def test_labels_become_embeddings_and_the_rest_stays() -> None:
    prompts = Prompts(CAPTIONS, rows())
    end = torch.tensor([0.1, 0.2, 0.3])
    filled = prompts.fill(Cond(torch.tensor([1, prompts.null, 0]), end=end))
    assert filled.label is None and filled.end is end and filled.pooled is None
    assert filled.text is not None and filled.mask is not None
    assert torch.equal(filled.text, prompts.rows.text[[1, 2, 0]])
    assert filled.text.dtype == torch.float16 and filled.mask.dtype == torch.bool
    assert prompts.fill(filled) is filled  # embeddings that are there are let be
    with pytest.raises(ValueError, match="every sample needs the number of its prompt"):
        prompts.fill(Cond())


def test_rows_must_be_those_of_the_prompts_and_of_none() -> None:
    with pytest.raises(ValueError, match="embeddings for 2 rows, and there are 2 prompts"):
        Prompts(CAPTIONS, rows(2))
    with pytest.raises(ValueError, match="embeddings for no rows"):
        Prompts(CAPTIONS, Cond())


def test_prompts_are_kept_in_a_file(tmp_path) -> None:
    prompts = Prompts(CAPTIONS, rows())
    (tmp_path / "prompts.safetensors").write_bytes(prompts.dump())
    kept = Prompts.load(tmp_path / "prompts.safetensors")
    assert kept.captions == CAPTIONS and kept.digest() == prompts.digest()
    assert torch.equal(kept.rows.text, prompts.rows.text) and kept.rows.second is None
    assert Prompts(("a cat", "a fox"), rows()).digest() != prompts.digest()
    (tmp_path / "torn").write_bytes(b"nothing")
    save_file({"text": torch.zeros(3)}, tmp_path / "other")
    for name in ("torn", "other", "missing"):
        with pytest.raises(ValueError, match="holds no prompts"):
            Prompts.load(tmp_path / name)
