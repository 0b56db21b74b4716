"""The names that format 1 had and this version has not: one table, read in both directions.

Model directories, text models and checkpoints of format 1 are read by it. Fingerprints are computed with the names of
format 1, so that embeddings that an earlier version made still belong to their model.
"""

from typing import Any

# Endings of the names of tensors.
TENSORS = {
    "embeddings.words.weight": "embeddings.token_embeddings.weight",
    "embeddings.places.weight": "embeddings.position_embeddings.weight",
    "embeddings.segments.weight": "embeddings.segment_embeddings.weight",
    ".words": ".output_embeddings",  # of a head for masked language modeling
}
PROBLEMS = {"single": "single_label", "several": "multi_label"}
MIX = {"in_turn": "round_robin"}


def tensor_name(name: str) -> str:
    """Return the name that a tensor of format 1 has now."""
    for old, new in TENSORS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def name_in_format_1(name: str) -> str:
    """Return the name that a tensor had in format 1."""
    for old, new in TENSORS.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def head_fields(fields: Any) -> Any:
    """Return the fields of a head of format 1 with the values of now."""
    if not isinstance(fields, dict) or not isinstance(problem := fields.get("problem"), str):
        return fields  # whoever reads them says what is wrong
    return {**fields, "problem": PROBLEMS.get(problem, problem)}


def checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 1 with the names of now."""

    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        return {tensor_name(name): x for name, x in state.items()}

    def meaning(kind: str, problem: str, labels: list[str]) -> list[Any]:
        return [kind, PROBLEMS.get(problem, problem), labels]

    content = {**content, "state_dict": renamed(content["state_dict"])}
    for state in content.get("callbacks", {}).values():
        if "average" in state:
            state["average"] = renamed(state["average"])
    if "heads" in content:
        content["heads"] = {name: meaning(*head) for name, head in content["heads"].items()}
    for state in content.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", []):
        if "mix" in state:
            state["mix"] = MIX.get(state["mix"], state["mix"])
        if "labels" in state:
            state["labels"] = [meaning(*use) for use in state["labels"]]
    return content
