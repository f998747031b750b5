"""RXNMapper's ALBERT (12 layers of 256 with shared weights, 0.8 M parameters): masked tokens of reactions.

Each token of each reaction in the package's tests is masked alone, and counts as found if it is the likeliest one.
Calibrated on the textbook reactions below, with every eighth token masked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from quality import assets
from quality.subject import Scores, Subject

_BATCH = 32
#: Tokens of SMILES, as Schwaller et al. cut them (Molecular Transformer, 1811.02633, section 4).
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|[BCNOSPFIbcnosp()=#\-+\\/:~@?*$.\d]")
#: An atom in brackets that means the same without them, as [nH] does not.
_PLAIN_ATOM = re.compile(r"\[(?:(Br|Cl|[BCNOSPFI])(?:H\d?)?|([bcnosp])|(c)H)\]")

#: Precursors >> product: esters, amides, couplings, reductions, protections, substitutions.
_TEXTBOOK = (
    "CC(=O)OC(C)=O.O=C(O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O",
    "CC(=O)OC(C)=O.Nc1ccc(O)cc1>>CC(=O)Nc1ccc(O)cc1",
    "OB(O)c1ccccc1.Brc1ccncc1.O=C([O-])[O-].[Na+].[Na+]>>c1ccc(-c2ccncc2)cc1",
    "CC(C)(C)OC(=O)N1CCNCC1.Cl>>C1CNCCN1",
    "O=C(O)c1ccc(F)cc1.NCc1ccccc1.CCN(CC)CC>>O=C(NCc1ccccc1)c1ccc(F)cc1",
    "O=Cc1ccccc1.C1CCNCC1.[BH4-].[Na+]>>C1CCN(Cc2ccccc2)CC1",
    "O=[N+]([O-])c1ccc(Cl)cc1.[Fe].[NH4+].[Cl-]>>Nc1ccc(Cl)cc1",
    "O=[N+]([O-])c1ccc(F)cc1.C1COCCN1>>O=[N+]([O-])c1ccc(N2CCOCC2)cc1",
    "CCOC(=O)c1ccc2[nH]ccc2c1.[OH-].[Na+].CO>>O=C(O)c1ccc2[nH]ccc2c1",
    "CS(=O)(=O)Cl.Nc1ccccc1Br.c1ccncc1>>CS(=O)(=O)Nc1ccccc1Br",
    "C#CCO.Ic1ccccc1.[Pd].[Cu]I.CCN(CC)CC>>OCC#Cc1ccccc1",
    "O=C(O)c1ccccc1.O=S(Cl)Cl>>O=C(Cl)c1ccccc1",
    "CC(C)(C)[Si](C)(C)Cl.OCc1ccccc1.c1c[nH]cn1>>CC(C)(C)[Si](C)(C)OCc1ccccc1",
    "C[C@H](N)C(=O)O.CC(C)(C)OC(=O)OC(=O)OC(C)(C)C>>C[C@H](NC(=O)OC(C)(C)C)C(=O)O",
    "O=C=Nc1ccccc1.CN>>CNC(=O)Nc1ccccc1",
    "COC(=O)c1ccc(O)cc1.BrCC1CC1.O=C([O-])[O-].[K+].[K+].CN(C)C=O>>COC(=O)c1ccc(OCC2CC2)cc1",
)


def subject() -> Subject:
    """The model, evaluated on every token of the package's reactions."""
    from transformers import AlbertForMaskedLM

    folder = assets.wheel_files(assets.ALBERT)
    model = AlbertForMaskedLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    vocabulary = {token: i for i, token in enumerate((folder / "vocab.txt").read_text().splitlines())}
    reactions = [_ids(tokens, vocabulary) for tokens in _reactions(folder, vocabulary)]
    expected = torch.cat([ids[1:-1] for ids in reactions])

    @torch.inference_mode()
    def evaluate(compressed: Any) -> Scores:
        rows = []
        for ids in reactions:
            positions = torch.arange(1, len(ids) - 1)
            for some in positions.split(_BATCH):
                masked = ids.repeat(len(some), 1)
                at = torch.arange(len(some))
                masked[at, some] = vocabulary["[MASK]"]
                rows.append(compressed(input_ids=masked).logits[at, some].clone())
        logits = torch.cat(rows)
        return Scores(float((logits.argmax(-1) == expected).double().mean()), logits)

    textbook = [_ids(_TOKEN.findall(text), vocabulary) for text in _TEXTBOOK]
    samples = [_masked(ids, vocabulary["[MASK]"], first) for ids in textbook for first in (1, 5)]
    return Subject(
        name="ALBERT of RXNMapper",
        model=model,
        calibration=samples,
        evaluate=evaluate,
        metric="masked token found",
        counted=f"{len(expected)} tokens of {len(reactions)} reactions; calibration {len(textbook)} other reactions",
        outputs="logits",
    )


def _reactions(folder: Path, vocabulary: dict[str, int]) -> list[list[str]]:
    """The reactions in the package's tests, without numbers of atoms; those of the same tokens count once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for file in ("test_mapper.py", "test_batched_mapper.py"):
        for text in re.findall(r'"([^"\s]*>>[^"\s]*)"', (folder / file).read_text()):
            plain = _PLAIN_ATOM.sub(r"\1\2\3", re.sub(r":\d+\]", "]", text))
            tokens = _TOKEN.findall(plain)
            if len(tokens) >= 8 and "".join(tokens) == plain and all(token in vocabulary for token in tokens):
                found.setdefault(tuple(sorted(tokens)), tokens)
    return list(found.values())


def _ids(tokens: list[str], vocabulary: dict[str, int]) -> torch.Tensor:
    return torch.tensor([vocabulary[token] for token in ["[CLS]", *tokens, "[SEP]"]])


def _masked(ids: torch.Tensor, mask: int, first: int) -> dict[str, torch.Tensor]:
    ids = ids.clone()
    ids[first:-1:8] = mask
    return {"input_ids": ids[None]}
