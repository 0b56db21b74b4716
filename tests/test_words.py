"""The language of the code and the docs: how docstrings begin, and phrases that must not return."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("dualenc/**/*.py"), *ROOT.glob("tools/**/*.py")])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("dualenc/**/*.jinja")])
# What the summary of a function's docstring may begin with. A new verb is added here.
VERBS = frozenset(
    """
    Accept Accumulate Add Adjust Advance Aggregate Allocate Allow Append Apply Arrange Ask Assert Assign Attach
    Attend Augment Average Backpropagate Begin Block Broadcast Build Cache Call Cast Catch Check Choose Classify
    Clean Clear Clip Close Collect Combine Compare Compile Compute Configure Connect Consume Continue Convert
    Copy Count Create Crop Cut Decide Declare Decode Decompress Delete Describe Detach Detect Determine Disable
    Discard Display Distribute Divide Download Draw Drop Embed Enable Encode End Ensure Enter Enumerate Escape
    Estimate Evaluate Examine Exit Expand Export Extend Extract Fail Feed Fetch Fill Filter Find Finish Fit Fix
    Flatten Flush Fold Follow Format Forward Freeze Gather Generate Get Give Group Guess Handle Hash Hide Ignore
    Import Increment Index Infer Initialize Insert Inspect Install Instantiate Interpolate Interrupt Iterate
    Join Keep Kill Label Launch Leave Let Limit List Load Locate Lock Log Look Lower Make Map Mark Mask Match
    Measure Merge Move Multiply Name Normalize Note Notify Number Open Order Pack Pad Parse Partition Pass Patch
    Pause Permute Pick Place Plot Pool Predict Prefetch Prepare Preprocess Print Probe Process Produce Project
    Propose Prune Publish Push Put Quote Raise Rank Read Rebuild Receive Record Reduce Refuse Register Release
    Reload Remember Remove Rename Render Reorder Repeat Replace Report Request Require Rescale Reset Reshape
    Resize Resolve Restart Restore Resume Retry Return Reverse Rewrite Rotate Round Run Sample Save Scale Scan
    Scatter Schedule Score Search Select Send Serialize Serve Set Show Shrink Shuffle Shut Sign Skip Slice Sort
    Split Stack Stage Start Step Stop Store Stream Strip Sum Suppress Swap Switch Sync Synchronize Take Tell
    Terminate Test Tie Time Tokenize Train Transform Translate Transpose Truncate Try Turn Unfreeze Unpack Unpad
    Update Upload Use Validate Verify Visit Wait Walk Warn Weight Wrap Write Yield
    """.split()  # noqa: SIM905
)
NOT_NOUNS = frozenset(
    [
        "What",
        "Whether",
        "Of",
        "Where",
        "How",
        "Whose",
        "Who",
        "That",
        "When",
        "Why",
        "As",
        "From",
        "In",
        "To",
        "With",
        "Under",
        "For",
        "Is",
        "Has",
    ]
)
# Phrases of an idiom that readers stumble over, and how to say it instead.
IDIOM = {
    r"(?<![Tt]here )\b(?:is|are|was) no (?!longer\b|more\b)[a-z]": "is not a / does not",
    r"\b(?:has|have|had) not\b(?! (?:been|yet|changed|already))": "lacks / does not have",
    r"\bas [\w.`' ]{1,30} has it\b": "as in ...",
    r"\bbut for\b": "except",
    r"\bso many\b": "this many / N",
    r"\bin the mean\b": "on average",
    r"(?<!['\"])\bbeside\b": "next to / compared with",
    r"\bthere is no telling\b": "unknown",
    r"\bg(?:o|oes|oing) on\b": "continue / resume",
    r"\bin words\b": "as text",
    r"\banew\b": "again / from the beginning",
    r"\bwhat is the matter\b": "the problem",
    r"\bat a stretch\b": "consecutive",
    r"\bnone of\b(?= [A-Z'\"{`])": "not one of",
    r"\bis of no\b": "has no",
    r"\bfrom (?:here|there) on\b": "from now on",
    r"\bas (?:it|they) (?:is|are)\b": "unchanged",
    r"\bgo(?:es)? without\b": "lack",
    r"\b(?:sick|quarantine)\b": "non-finite step / bad sample",
}


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the comments and the strings of a source file, or the lines of a page, with their line numbers."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        fenced = False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                yield number, line
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE"):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def faults(path: Path) -> list[str]:
    """Return what a file says in the old idiom."""
    found = []
    for number, line in words_of(path):
        for pattern, better in IDIOM.items():
            if match := re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r} ({better})")
    if path.suffix == ".py":
        for node, text in docstrings(ast.parse(path.read_text("utf-8"))):
            first = re.split(r"[^\w-]", text.strip("`"), maxsplit=1)[0]
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
            is_property = isinstance(node, ast.FunctionDef) and any(
                "property" in ast.unparse(d) for d in node.decorator_list
            )
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_property:
                if first not in VERBS and not text.startswith("See `"):
                    found.append(
                        f"{where}: the docstring of {node.name} begins with {first!r}, which is not a known verb"
                    )
            elif first in NOT_NOUNS or (isinstance(node, ast.ClassDef) and first.endswith("s") and first[:-1] in VERBS):
                found.append(f"{where}: a docstring begins with {first!r}")
    return found


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_words(path: Path) -> None:
    assert faults(path) == []
