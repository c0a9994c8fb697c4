"""Which networks are trained and compared: the baseline, found cells, cells by name, controls, seeds."""
import hashlib
import pathlib
import typing

from dyncell import CELLS, DECODER, Genotype, make_cell  # make_cell: for others that import it from here
from dyncell import DecoderCell as Decoder
from experiment import weights
from util.errors import InputError
from util.files import load, read_log


def as_text(genotype):
    """A Genotype or DECODER -> the text that a checkpoint holds."""
    return genotype.to_json() if isinstance(genotype, Genotype) else genotype


def cell_of(text):
    """The argument of --cell -> a name for files, and a Genotype or DECODER.

    The argument may be a name in CELLS, "decoder", a JSON file, a checkpoint of a cell, or a genotype as
    JSON or as it is printed. A cell that is not in CELLS is named by a hash. Raises InputError for anything
    else."""
    if text == DECODER or text in CELLS:
        return text, CELLS.get(text, DECODER)
    try:
        genotype = Genotype(read_cell(text))
    except ValueError as error:
        raise InputError(f"argument --cell: invalid choice: {text[:60]!r} ({error}); it takes "
                         f"{', '.join(CELLS)}, {DECODER}, a JSON file of a genotype, a checkpoint of a "
                         "cell, or a genotype as it is printed") from None
    for name, known in CELLS.items():
        if genotype == known:
            return name, known
    return f"custom-{hashlib.sha256(genotype.to_json().encode()).hexdigest()[:6]}", genotype


def read_cell(text):
    """The content of the file of this name, or the text itself if it is no file name."""
    path = pathlib.Path(text)
    if not text.lower().endswith((".json", ".jsonl", ".pt", ".txt")):
        return text
    try:
        if path.suffix == ".pt":
            return weights.read(path, "--cell takes a trained cell")["genotype"]
        return path.read_text()
    except KeyError:
        raise ValueError("not the checkpoint of a cell") from None
    except OSError as error:
        raise ValueError(error.strerror) from None


def cell_text(text):
    """The argument of --cell as a recipe keeps it: a name or the printed genotype, never a file, which may
    move."""
    name, genotype = cell_of(text)
    return name if genotype == DECODER or name in CELLS else str(genotype)


TITLES = {DECODER: "arch2's decoder as the cell", "cell0": "cell0 (reconstructed)",
          "cell1": "cell1 (reconstructed)", "cell2": "cell2 (reconstructed)",
          "cell3": "cell3 (reconstructed)"}
# For each search: its log, the name of its cells in files, and its name in the table.
SEARCHES = {"ppo": ("search.jsonl", "cell", "PPO"), "random": ("random.jsonl", "random", "random search")}


class Network(typing.NamedTuple):
    """A network of the table; each seed is a network of its own."""
    name: str
    title: str
    genotype: Genotype | str | None = None
    past: bool = True
    seed: int = 0

    @property
    def control(self):
        return self.genotype in (None, DECODER) or not self.past


def strategies(recipe):
    """The searches of a run."""
    if not recipe.cells:
        return ()
    return ("ppo", "random") if recipe.search_strategy == "both" else (recipe.search_strategy,)


def ranked(run, strategy):
    """The distinct genotypes of a search, best reward first. Raises InputError if all candidates failed."""
    path, r = run.path(SEARCHES[strategy][0]), run.recipe
    entries = []
    for entry in read_log(path).values():
        if entry["status"] == "ok" and entry["candidate"] < r.search_candidates:
            entries.append(entry)
    if not entries:
        raise InputError(f"{path}: every candidate failed, so there is no cell to train; use another --run")
    entries.sort(key=lambda entry: (-entry["reward"], entry["candidate"]))
    return list(dict.fromkeys(Genotype.from_tokens(entry["tokens"]) for entry in entries))


def numbered(run, kind, genotypes):
    """{genotype: name}, where names are cell-0, cell-1, ... A cell that was trained keeps its name, even if
    the search has continued and found better ones. New cells get the next numbers."""
    names = {}
    while True:
        name = f"{kind}-{len(names)}"
        paths = [path for path in (run.path(f"{name}.pt"), run.path(f"{name}-alone.pt")) if path.exists()]
        if not paths:
            break
        names[Genotype.from_json(load(paths[0])["genotype"])] = name
    for genotype in genotypes:
        names.setdefault(genotype, f"{kind}-{len(names)}")
    return names


def networks(run):
    """The networks that finetune trains and evaluate scores, in the table's order. Rank 0 decides for all
    processes."""
    chosen = [Network("baseline", "per-frame baseline, trained as long")]
    if run.rank == 0:
        for strategy in strategies(run.recipe):
            _, kind, said = SEARCHES[strategy]
            order = ranked(run, strategy)
            best = order[:run.recipe.cells]
            names = numbered(run, kind, best)
            for genotype, name in names.items():
                chosen.append(Network(name, f"{name}, {said}", genotype))
                looks_back = set(genotype.inputs()) & {0, 1}      # layer4 or dec of the previous frame
                if genotype == best[0] and looks_back and kind == "cell" and run.recipe.without_past:
                    title = f"{name}, the past zeroed"
                    chosen.append(Network(f"{name}-without-past", title, genotype, past=False))
            if run.recipe.median_cell and kind == "random":
                for genotype, name in numbered(run, "random-median", [order[len(order) // 2]]).items():
                    chosen.append(Network(name, "random search's median cell", genotype))
        for text in run.recipe.cell:
            name, genotype = cell_of(text)
            chosen.append(Network(f"cell-{name}", TITLES.get(name, name), genotype))
    seeded = []
    for network in run.agree(chosen):
        seeded.append(network)
        for seed in range(1, run.recipe.seeds):
            seeded.append(network._replace(name=f"{network.name}-seed{seed}", seed=seed))
    return seeded
