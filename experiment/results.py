"""The content of a protocol's results.json."""

from evidence.search_state import skip_connections
from experiment.members import MAY_DIFFER, Member, Plan, fingerprints
from genotypes import from_str
from models.spaces import space_of
from run.folder import read_json
from run.options import as_text

NOT_CONDITIONS = {*MAY_DIFFER, "genotype", "name", "seed", "hold_out", "checkpoint_minutes"}


def results_of(plan: Plan, version: str) -> dict:
    """The options, and the results of every member so far. Accuracies are fractions, times are seconds.

    version: the version of this program.
    """
    options = plan.options
    best = {kind: plan.best(kind) for kind in ("search", "random")}
    return {
        "format": 2,
        "label": options.label,
        "command": options.command,
        "finals": options.finals,
        "version": version,
        "search_options": conditions(plan.search_config) if options.searches else None,
        "search_space": {name: as_text(getattr(plan.search_config, name)) for name in ("space", "nodes", "primitives")},
        "training_options": None if plan.truth_known else training_options(plan),
        "selected": {kind: member and member.name for kind, member in best.items()},
        "members": [result_of(plan, member) for member in plan.members],
    }


def training_options(plan: Plan) -> dict:
    """The options of all trainings."""
    options = plan.options
    selection = {"hold_out": options.hold_out, "select_epochs": options.select_epochs, "select_seed": options.seed}
    return conditions(plan.training_config) | selection


def conditions(config) -> dict:
    """The options of search.py or augment.py that are the same in all runs and can change their results."""
    return {name: value for name, value in config.as_dict().items() if name not in NOT_CONDITIONS}


def result_of(plan: Plan, member: Member) -> dict:
    """The results of a member so far, and the number of skip connections in its cell."""
    genotype = plan.genotype(member)
    result = {"name": member.name, "kind": member.kind, "seed": member.seed, "genotype": genotype}
    if genotype is None:
        return result
    if member.kind == "search":
        search = plan.summary(plan.search(member))
        result["search"] = values(search, "epochs", "valid_top1", "verdict", "eigenvalue") | origin(search)
        if plan.truth_known:
            history = read_json(plan.search(member).config.folder().history)
            result["search"]["history"] = [without_truth(entry) for entry in history]
    cell = from_str(genotype)
    result["skip_connections"] = {kind: skip_connections(getattr(cell, kind)) for kind in space_of(cell).kinds}
    result["truth"] = space_of(cell).truth(cell)
    if plan.truth_known:
        return result
    selection = plan.summary(plan.selection(member))
    if selection:
        result |= values(selection, "parameters_M", "multiply_adds_M", "held_out_top1")
        result["selection"] = origin(selection)
    finals = [(seed, plan.summary(plan.final(member, seed))) for finalist, seed in plan.finals() if finalist == member]
    result["final"] = [{"seed": seed} | values(final, "test_top1") | origin(final) for seed, final in finals if final]
    return result


def without_truth(entry: dict) -> dict:
    """An epoch of a history without what is known of its genotype."""
    return {name: value for name, value in entry.items() if name != "truth"}


def values(summary: dict, *names: str) -> dict:
    return {name: summary[name] for name in names}


def origin(summary: dict) -> dict:
    """How long a run took, and which program, machine and images its results are from."""
    return values(summary, "seconds", "version", "machine") | {"fingerprints": fingerprints(summary)}
