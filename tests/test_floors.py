"""The house: a file imports from its own floor or from one below; no import inside a function but main()."""
import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = {"util": 1, "ops": 2, "data": 2, "dyncell": 3, "controller": 3, "experiment": 4, "train": 5}


def test_arrows_point_downwards_and_never_in_a_circle():
    arrows = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("util/*.py"), *ROOT.glob("experiment/*.py")]:
        name, tree = ".".join(path.relative_to(ROOT).with_suffix("").parts), ast.parse(path.read_text())
        inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name != "main"
                  for n in ast.walk(f)}
        arrows[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert node not in inside, f"{name}: an import inside a function, line {node.lineno}"
                for alias in node.names:
                    module = getattr(node, "module", None)
                    full = module or alias.name
                    full += f".{alias.name}" * (module in ("util", "experiment"))
                    if full.split(".")[0] in FLOORS:
                        arrows[name].add(full)
                        assert FLOORS[full.split(".")[0]] <= FLOORS[name.split(".")[0]], f"{name} -> {full}"
    while arrows:                            # take away what imports nothing that is left: a circle stays
        leaves = [name for name, to in arrows.items() if not to & arrows.keys()]
        assert leaves, f"these import each other in a circle: {sorted(arrows)}"
        for name in leaves:
            del arrows[name]
