"""Which networks are trained and compared: the baseline, found cells, cells by name, controls, seeds."""
import hashlib
import pathlib
import re
import typing

from dyncell import CELLS, DECODER, Genotype
from util.errors import InputError
from util.files import load, read_log

KNOWN = {**CELLS, DECODER: DECODER}          # name: Genotype or DECODER, the static network's decoder
# For each search: its log, the name of its cells in files, and its name in the table.
SEARCHES = {"ppo": ("search.jsonl", "cell", "PPO"), "random": ("random.jsonl", "random", "random search")}


def cell_of(argument):
    """An argument of --cell -> the cell's name, and its Genotype or DECODER.

    It is a name in KNOWN, a file (a genotype's JSON, or a checkpoint, of which only the genotype is taken),
    or a genotype: as it is printed, as JSON, as a list of tokens. NAME=ARGUMENT names the row; else a cell
    that is not in KNOWN is named by a hash. Raises InputError for anything else."""
    # NAME has no "-", so that it is no name of the program's: cell-0, cell-x-seed1, cell-x-alone.
    name, text = re.fullmatch(r"(?as)(?:\s*(?!node\d)([A-Za-z]\w*)\s*=)?(.*)", argument).groups()
    path = pathlib.Path(text.strip()).expanduser()
    try:
        if path.suffix == ".pt":
            text = load(path, "--cell takes a trained cell").get("genotype", "no cell")
        elif path.suffix in (".json", ".txt"):
            text = path.read_text()
        genotype = KNOWN.get(text.strip()) or Genotype(text.strip())
    except (ValueError, OSError, AttributeError) as error:
        raise InputError(f"argument --cell: invalid choice: {argument[:60]!r} ({error}); it takes "
                         f"{', '.join(KNOWN)}, a JSON file of a genotype, a checkpoint of a cell, or a "
                         "genotype as it is printed; NAME=GENOTYPE names its row") from None
    known = {genotype: name for name, genotype in KNOWN.items()}.get(genotype)
    return name or known or f"custom-{hashlib.sha256(genotype.to_json().encode()).hexdigest()[:6]}", genotype


def cell_texts(arguments):
    """The arguments of --cell as a recipe keeps them, each once: genotypes, not files, which may move."""
    cells, texts = dict(KNOWN, baseline=None), []
    for name, genotype in map(cell_of, arguments):
        if cells.setdefault(name, genotype) != genotype:
            raise InputError(f"argument --cell: {name!r} is the name of two cells; choose another one")
        text = str(genotype) if name.startswith("custom-") else f"{name}={genotype}"
        texts.append(name if name in KNOWN else text)
    return tuple(dict.fromkeys(texts))


def strategies(recipe):
    """The searches of a run."""
    some = tuple(SEARCHES) if recipe.search_strategy == "both" else (recipe.search_strategy,)
    return some if recipe.cells else ()


def ranked(run, strategy):
    """The distinct genotypes of a search, best reward first. Raises InputError if there is none."""
    path, count = run.path(SEARCHES[strategy][0]), run.recipe.search_candidates
    entries = [entry for k, entry in read_log(path).items() if k < count]
    good = [entry for entry in entries if entry["status"] == "ok"]
    if len(entries) < count or not good:
        raise InputError(f"{path}: has {len(entries)} of {count} candidates, and {len(good)} did not fail; "
                         "run --stage search first, or take fewer by --search-candidates")
    good.sort(key=lambda entry: -entry["reward"])                 # of equal ones the earlier comes first
    return list(dict.fromkeys(Genotype.from_tokens(entry["tokens"]) for entry in good))


def trained(run, name):
    """The Genotype or DECODER of a cell that was trained under this name, or None."""
    if saved := load(run.path(f"{name}.pt"), absent={}) or load(run.path(f"{name}-alone.pt"), absent={}):
        return DECODER if saved["genotype"] == DECODER else Genotype(saved["genotype"])


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


def found(run):
    """Yields the networks with cells that the searches have found."""
    for strategy in strategies(run.recipe):
        (_, kind, title), order = SEARCHES[strategy], ranked(run, strategy)
        for genotype, name in numbered(run, kind, order[:run.recipe.cells]).items():
            yield Network(name, f"{name}, {title}", genotype)
            looks_back = set(genotype.inputs()) & {0, 1}          # layer4 or dec of the previous frame
            if genotype == order[0] and looks_back and strategy == "ppo" and run.recipe.without_past:
                yield Network(f"{name}-without-past", f"{name} without the past", genotype, past=False)
        if run.recipe.median_cell and strategy == "random":
            for genotype, name in numbered(run, "random-median", [order[len(order) // 2]]).items():
                yield Network(name, f"{name}, {title}", genotype)


def named(run):
    """Yields the networks of --cell. Raises InputError if the folder has another cell of one of the names."""
    for name, genotype in map(cell_of, run.recipe.cell):
        title = "the static decoder as the cell" if name == DECODER else name
        title += " (reconstructed)" * bool(re.fullmatch(r"cell\d", name))         # a cell of the paper's
        if trained(run, f"cell-{name}") not in (None, genotype):
            raise InputError(f"--cell {name}: {run.path(f'cell-{name}.pt')} is another cell; rename this one")
        yield Network(f"cell-{name}", title, genotype)


def networks(run):
    """The networks of finetune and evaluate, in the table's order. Rank 0 decides for all processes."""
    chosen = run.first(lambda: [Network("baseline", "baseline, fine-tuned"), *found(run), *named(run)])
    return [network._replace(name=f"{network.name}-seed{seed}" if seed else network.name, seed=seed)
            for network in chosen for seed in range(run.recipe.seeds)]
