# SPDX-License-Identifier: Apache-2.0
"""Codes of classes for DICOM: of the task, else found by the name of the class in the lists of the standard."""

from __future__ import annotations

import functools
import logging
import re
import zlib
from typing import NamedTuple

from pydicom.sr.codedict import Code, codes

from samda.task import Task

logger = logging.getLogger(__name__)

LISTS = {  # context group of property types -> category (CID 7150)
    7192: Code("123037004", "SCT", "Anatomical Structure"),
    7191: Code("85756007", "SCT", "Tissue"),
    7194: Code("49755003", "SCT", "Morphologically Abnormal Structure"),
    7197: Code("91720002", "SCT", "Body Substance"),
}
SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}
ALIASES = {  # usual names of classes -> names of the standard
    "adrenal": "adrenalgland",
    "atrialappendage": "leftauricularappendage",
    "bone": "bonetissue",
    "bowel": "smallintestine",
    "smallbowel": "smallintestine",
    "cancer": "neoplasm",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "metastasis": "neoplasmsecondary",
    "metastases": "neoplasmsecondary",
    "csf": "cerebrospinalfluid",
    "fat": "adiposetissue",
    "heartventricle": "ventricle",
    "heartatrium": "atrium",
    "ivc": "inferiorvenacava",
    "postcava": "inferiorvenacava",
    "svc": "superiorvenacava",
    "muscle": "muscletissue",
    "oesophagus": "esophagus",
    "urinarybladder": "bladder",
    "vessel": "bloodvessel",
    "hippocampi": "hippocampus",
    "thyroidgland": "thyroid",
}
NOT_A_CLASS = ("background", "normal", "organ", "tissue", "media", "back", "hiatus", "stripe", "baffle", "phantom")


class ClassCode(NamedTuple):
    """What a class is, for DICOM."""

    category: Code
    type: Code
    side: Code | None = None
    region: Code | None = None  # where an abnormal structure lies


def class_code(task: Task, name: str) -> ClassCode:
    """The code of a class; one of samda's own scheme, with a warning, for names that the standard does not list."""
    given = (task.codes or {}).get(name)
    if given is not None:
        code = Code(*given)
        known = _known().values()
        categories = [entry.category for entry in known if entry.type[:2] == code[:2]]
        return ClassCode(categories[0] if categories else LISTS[7192], code)
    words = re.findall(r"[^\W_]+", name.casefold())
    found = _find(words)
    sides = [word for word in words if word in SIDES]
    rest = [word for word in words if word not in SIDES]
    if found is None and len(sides) == 1:
        found = _find([*sides, *rest]) or _find(rest)  # left ventricle, kidney
        if found is not None and sides[0] not in found.type.meaning.lower():
            found = found._replace(side=SIDES[sides[0]])
    if found is None and len(words) > 1:  # liver tumor
        what, where = _find(words[-1:]), _find(words[:-1])
        if what is not None and where is not None and what.category == LISTS[7194]:
            found = what._replace(region=where.type)
    return _own_code(name) if found is None else found


@functools.cache
def _own_code(name: str) -> ClassCode:
    """Of samda's own scheme, which is told once in a process, not in every case."""
    logger.warning(
        "class %r has no code in DICOM's lists, one of the scheme 99SAMDA is written; set codes of the task", name
    )
    value = re.sub(r"[^0-9a-z]", "", name.lower())
    if not 0 < len(value) <= 16:
        value = f"{value[:8]}{zlib.crc32(name.encode()):08x}"
    return ClassCode(LISTS[7192], Code(value, "99SAMDA", name.replace("\\", "/")[:64]))


def _find(words: list[str]) -> ClassCode | None:
    """The code of a name, also of its plural, with the noun first or last (vertebrae L1)."""
    for word in ("".join(words), "".join(words[::-1])):
        for tried in (word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("e")):
            tried = ALIASES.get(tried, tried)
            if tried in _known():
                return _known()[tried]
    return None


@functools.cache
def _known() -> dict[str, ClassCode]:
    """The names of the standard, in small letters, with their codes of SNOMED CT."""
    found: dict[str, ClassCode] = {}
    for number, category in LISTS.items():
        for word, code in getattr(codes, f"CID{number}").concepts.items():
            if code.scheme_designator == "SCT" and word.lower() not in NOT_A_CLASS:
                found.setdefault(word.lower(), ClassCode(category, code))
    return found
