"""Which networks are trained and compared: the baseline, found cells, cells by name, controls, seeds."""
import hashlib
import pathlib
import re
import typing

from dyncell import CELLS, DECODER, Genotype
from experiment import weights
from util.errors import InputError
from util.files import load, read_log

KNOWN = {**CELLS, DECODER: DECODER}          # name: Genotype or DECODER, the static network's decoder


def as_text(genotype):
    """A Genotype or DECODER -> the text that a checkpoint holds."""
    return genotype.to_json() if isinstance(genotype, Genotype) else genotype


def cell_of(text):
    """The argument of --cell -> the cell's name, and its Genotype or DECODER.

    The argument is a name in KNOWN, a file (a genotype's JSON, or a checkpoint, of which only the genotype is
    taken), or a genotype: as it is printed, as JSON, as a list of tokens. NAME=ARGUMENT names the row; else a
    cell that is not in KNOWN is named by a hash. Raises InputError for anything else."""
    # NAME has no "-", so that it is no name of the program's: cell-0, cell-x-seed1, cell-x-alone.
    named = re.fullmatch(r"\s*(?!node\d)([A-Za-z]\w*)\s*=(.*)", text, re.DOTALL | re.ASCII)
    name, cell = named.groups() if named else (None, text)
    try:
        genotype = read_cell(cell.strip())
    except (ValueError, OSError) as error:
        raise InputError(f"argument --cell: invalid choice: {text[:60]!r} ({error}); it takes "
                         f"{', '.join(KNOWN)}, a JSON file of a genotype, a checkpoint of a cell, or a "
                         "genotype as it is printed; NAME=GENOTYPE names its row") from None
    known = {cell: name for name, cell in KNOWN.items()}
    digest = hashlib.sha256(as_text(genotype).encode()).hexdigest()
    return name or known.get(genotype, f"custom-{digest[:6]}"), genotype


def read_cell(text):
    """What --cell takes, without NAME= -> a Genotype or DECODER. Raises ValueError or OSError."""
    path = pathlib.Path(text).expanduser()
    if path.suffix == ".pt":
        content = weights.read(path, "--cell takes a trained cell")
        if "genotype" not in content:
            raise ValueError("not the checkpoint of a cell")
        text = content["genotype"]
    elif path.suffix in (".json", ".txt"):
        text = path.read_text().strip()
    return KNOWN[text] if text in KNOWN else Genotype(text)


def cell_texts(arguments):
    """The arguments of --cell as a recipe keeps them, each once: with genotypes, not files, which may move.
    Raises InputError if two cells have the same name."""
    cells, texts = dict(KNOWN), []
    for name, genotype in map(cell_of, arguments):
        if cells.setdefault(name, genotype) != genotype:
            raise InputError(f"argument --cell: {name!r} is the name of two cells; choose another one")
        text = str(genotype) if name.startswith("custom-") else f"{name}={genotype}"
        texts.append(name if name in KNOWN else text)
    return tuple(dict.fromkeys(texts))


# For each search: its log, the name of its cells in files, and its name in the table.
SEARCHES = {"ppo": ("search.jsonl", "cell", "PPO"), "random": ("random.jsonl", "random", "random search")}


def strategies(recipe):
    """The searches of a run."""
    if not recipe.cells:
        return ()
    return ("ppo", "random") if recipe.search_strategy == "both" else (recipe.search_strategy,)


def ranked(run, strategy):
    """The distinct genotypes of a search, best reward first. Raises InputError if it is not finished, or if
    all candidates failed."""
    path, count = run.path(SEARCHES[strategy][0]), run.recipe.search_candidates
    entries = [entry for k, entry in sorted(read_log(path).items()) if k < count]
    if len(entries) < count:
        raise InputError(f"{path}: has {len(entries)} of {count} candidates; run --stage search first, or "
                         "take fewer by --search-candidates")
    entries = [entry for entry in entries if entry["status"] == "ok"]
    if not entries:
        raise InputError(f"{path}: every candidate failed, so there is no cell to train; use another --run")
    entries.sort(key=lambda entry: -entry["reward"])
    return list(dict.fromkeys(Genotype.from_tokens(entry["tokens"]) for entry in entries))


def trained(run, name):
    """The Genotype or DECODER of a cell that was trained under this name, or None."""
    for path in (run.path(f"{name}.pt"), run.path(f"{name}-alone.pt")):
        if path.exists():
            return read_cell(load(path)["genotype"])
    return None


def numbered(run, kind, genotypes):
    """{genotype: name}, where names are cell-0, cell-1, ... A cell that was trained keeps its name, even if
    the search has continued and found better ones. New cells get the next numbers."""
    names = {}
    while genotype := trained(run, f"{kind}-{len(names)}"):
        names[genotype] = f"{kind}-{len(names)}"
    for genotype in genotypes:
        names.setdefault(genotype, f"{kind}-{len(names)}")
    return names


class Network(typing.NamedTuple):
    """A network of the table; each seed is a network of its own."""
    name: str
    title: str
    genotype: Genotype | str | None = None
    past: bool = True
    seed: int = 0

    @property
    def control(self):
        """Whether it is only there for comparison, and never a run's best."""
        return self.genotype in (None, DECODER) or not self.past


def found(run, strategy):
    """The networks with cells that a search has found."""
    _, kind, title = SEARCHES[strategy]
    order, chosen = ranked(run, strategy), []
    for genotype, name in numbered(run, kind, order[:run.recipe.cells]).items():
        chosen.append(Network(name, f"{name}, {title}", genotype))
        looks_back = set(genotype.inputs()) & {0, 1}              # layer4 or dec of the previous frame
        if genotype == order[0] and looks_back and strategy == "ppo" and run.recipe.without_past:
            chosen.append(Network(f"{name}-without-past", f"{name} without the past", genotype, past=False))
    if run.recipe.median_cell and strategy == "random":
        for genotype, name in numbered(run, "random-median", [order[len(order) // 2]]).items():
            chosen.append(Network(name, "random search's median cell", genotype))
    return chosen


def named(run):
    """The networks with the cells that --cell names. Raises InputError if one of the names belongs to
    another cell in the run's folder."""
    chosen = []
    for name, genotype in map(cell_of, run.recipe.cell):
        title = {DECODER: "the static decoder as the cell"}.get(name, name)
        published = re.fullmatch(r"cell\d", name)                 # see CELLS
        chosen.append(Network(f"cell-{name}", title + " (reconstructed)" * bool(published), genotype))
        if trained(run, f"cell-{name}") not in (None, genotype):
            raise InputError(f"--cell {name}: {run.path(f'cell-{name}.pt')} holds another cell of this name; "
                             "choose another one")
    return chosen


def networks(run):
    """The networks that finetune trains and evaluate scores, in the table's order, each seed after the other.
    Rank 0 decides for all processes."""
    chosen = [Network("baseline", "baseline, fine-tuned")]
    if run.rank == 0:
        for strategy in strategies(run.recipe):
            chosen += found(run, strategy)
        chosen += named(run)
    seeded = []
    for network in run.broadcast(chosen):
        for seed in range(run.recipe.seeds):
            name = f"{network.name}-seed{seed}" if seed else network.name
            seeded.append(network._replace(name=name, seed=seed))
    return seeded
