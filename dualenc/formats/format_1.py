"""Names of format 1 that have changed since: one table, read in both directions.

It is used to read model directories, text models and checkpoints of format 1. Fingerprints are computed with the names
of format 1, so that embeddings made by an earlier version still match their model.
"""

from typing import Any

# Suffixes of tensor names.
TENSORS = {
    "embeddings.words.weight": "embeddings.token_embeddings.weight",
    "embeddings.places.weight": "embeddings.position_embeddings.weight",
    "embeddings.segments.weight": "embeddings.segment_embeddings.weight",
    ".words": ".output_embeddings",  # A parameter of the masked-language-model head.
}
PROBLEMS = {"single": "single_label", "several": "multi_label"}
MIX = {"in_turn": "round_robin"}


def tensor_name(name: str) -> str:
    """Return the current name of a tensor of format 1."""
    for old, new in TENSORS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def name_in_format_1(name: str) -> str:
    """Return the name of a current tensor in format 1."""
    for old, new in TENSORS.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def head_fields(fields: Any) -> Any:
    """Return the fields of a head of format 1 with current values."""
    if not isinstance(fields, dict) or not isinstance(problem := fields.get("problem"), str):
        return fields  # The reader of the fields reports the fault.
    return {**fields, "problem": PROBLEMS.get(problem, problem)}


def checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 1 with current names."""

    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        return {tensor_name(name): x for name, x in state.items()}

    def with_problem(kind: str, problem: str, labels: list[str]) -> list[Any]:
        return [kind, PROBLEMS.get(problem, problem), labels]

    content = {**content, "state_dict": renamed(content["state_dict"])}
    for state in content.get("callbacks", {}).values():
        if "average" in state:
            state["average"] = renamed(state["average"])
    if "heads" in content:
        content["heads"] = {name: with_problem(*head) for name, head in content["heads"].items()}
    for state in content.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", []):
        if "mix" in state:
            state["mix"] = MIX.get(state["mix"], state["mix"])
        if "labels" in state:
            state["labels"] = [with_problem(*use) for use in state["labels"]]
    return content
