"""What a user of the command can get wrong, with the parts that ship: one sentence, no folder."""

import pathlib

import pytest

from fedjaxprune.cli.main import main
from tests import stub

FILES = {
    "broken.py": "def net(:\n",
    "raises.py": "raise RuntimeError('no such device')\n",
    "plain.py": "METHOD = 5\n\ndef net(*, input_shape, num_classes, width):\n    return width\n",
    "flat.yaml": "algorithm: feddip\n",
    "typo.yaml": "method: {name: feddip, sparsty: 0.5}\n",
    "part.yaml": "client: {optimizer: {name: adamw}}\n",
    "variant.yaml": "method: feddip/without\n",
    "foreign.yaml": "method: {name: fedavg, sparsity: 0.5}\n",
    "sweep.yaml": "method: feddip\nmethod.sparsity: [0.5, 1.5]\n",
    "case.yaml": "cases: [{method: feddip}, {method: fedip}]\n",
    "pooled.yaml": "method: {name: pooled_filters, pretrain_epochs: 3}\n",
    "sizes.yaml": "model: {name: mlp, hidden_sizes: [10, -1]}\n",
    "cohort.yaml": "data.num_clients: 4\nfederation.cohort_size: [2, 9]\n",
    "notes": "",
    "holes.csv": "a,b\n,0\n" + "1,0\n2,1\n" * 9,
    "play.txt": "abcde" * 40,
    "tokens.py": """
import flax.linen as nn

def net(*, num_classes):
    return nn.Embed(num_classes, num_classes)

def small(*, num_classes):
    return nn.Embed(num_classes - 1, num_classes)
""",
    "numbers.csv": "a,b\n1,2\n3,4\n",
}
BAD = {
    # runs
    "method": ("run --method fedipp", ["method must be one of", "did you mean 'feddip'?"]),
    "old name": ("run --method scaffold", ["'scaffold' is a correction, not a method"]),
    "variant": ("run --method feddip/with", ["without_penalty, without_pruning, got 'with'"]),
    "no variants": ("run --method random_masks/x", ["'random_masks' has no variants, got 'x'"]),
    "item": ("run --hidden-sizes 0", ["hidden_sizes", "each at least 1, got 0 as item 1"]),
    "later item": ("run --hidden-sizes 10,-1", ["each at least 1, got -1 as item 2"]),
    "item in file": ("validate sizes.yaml", ["got -1 as item 2 (from sizes.yaml)."]),
    "two kinds": ("run --fraction 0.1", ["trimmed_mean, not of weighted_mean, and of top_k, r"]),
    "pretrained": ("run --method mpfl --pretrain-epochs 3", ["(method.vote_epochs)"]),
    "pretrained control": ("validate pooled.yaml", ["did you mean method.vote_epochs?"]),
    "pretrained elsewhere": (
        "run --method fedavg --pretrain-epochs 3",
        ["since schema 2 it is method.server_epochs or method.vote_epochs."],
    ),
    "model": ("run --model lenet", ["model must be one of", "did you mean 'lenet5'?"]),
    "momentum": ("run --optimizer adam --momentum 0.9", ["a setting of sgd, not of adam"]),
    "nova": (
        "run --optimizer adam --correction fednova",
        ["client.optimizer must be 'sgd' with client.correction 'fednova'", "got 'adam'"],
    ),
    "explorers": (
        "run --method autoflip --model mlp --stop-on validation --validation-fraction 1",
        ["method.validation_fraction must be less than 1", "no examples to train on"],
    ),
    "explorers' share": (
        "run --method autoflip --model mlp --stop-on validation --validation-fraction 0.999",
        ["method.validation_fraction must leave explorers examples", "0.999 holds out all"],
    ),
    "first convolution": (
        "run --method random_masks --allocation uniform_but_first --model mlp",
        ["keeps the first convolution dense", "the network has none"],
    ),
    "gates": ("run --method adaptive_dynamic_pruning --model mlp", ["needs gates", "'mlp'"]),
    "norm": ("run --method fedtiny --model mlp", ["needs BatchNorm", "'mlp'"]),
    "filters": ("run --method mpfl --model mlp", ["needs convolutions", "'mlp'"]),
    "data": ("run --model lenet5", ["model 'lenet5' does not fit the data set"]),
    "sequences": ("run --model char_lstm", ["model 'char_lstm' does not fit the data set"]),
    "folder": ("run --dataset mnist --data-dir /nowhere", ["/nowhere", "does not exist"]),
    "partition": ("run --num-clients 5000 --cohort-size 2", ["data.partition", "5000"]),
    "shards": ("run --partition shards --classes-per-client 11", ["classes_per_client", "11"]),
    "minimum": (
        "run --partition dirichlet --min-client-size 999",
        ["data.partition 'dirichlet'", "999"],
    ),
    "key": ("run --partition by_key", ["by_key"]),
    "batch": ("run --batch-size 2000000", ["client.batch_size must be at most", "got 2000000"]),
    "epochs": ("run --epochs 99999999", ["client.epochs must be at most", "got 99999999"]),
    "initial": ("run --initial-sparsity 0.95", ["method.initial_sparsity", "0.95"]),
    "server": ("run --server-optimizer fedadam", ["server_learning_rate must be set"]),
    "bits": ("run --uplink quantize --uplink.bits 99", ["uplink.bits", "99"]),
    "trimmed": ("run --aggregator trimmed_mean --fraction 0.7", ["aggregator", "0.7"]),
    "track": ("run --track tensorbord", ["did you mean 'tensorboard'?"]),
    "taken": ("run --folder taken", ["taken", "empty"]),
    "file": ("run --folder numbers.csv/run", ["numbers.csv"]),
    "resume": ("run --resume nowhere", ["nowhere", "holds no run"]),
    "no label": ("run --dataset numbers.csv", ["label (--label COLUMN): numbers.csv", "a, b"]),
    "bare folder": ("run --dataset png", ["'png' is not prepared", "a folder here: write ./png"]),
    "near folder": ("run --dataset digit", ["there is a folder here: write ./digit", "'digits'?"]),
    "bare file": ("run --dataset notes", ["there is a file here: write ./notes"]),
    "missing value": ("run --dataset holes.csv --label b", ["has 1 missing value in column 'a'"]),
    "tokens": (
        "run --dataset play.txt --length 2",
        ["'mlp' does not fit", "tokens", "; built-in models that fit: char_lstm, gpt."],
    ),
    "outputs": (
        "run --dataset play.txt --length 2 --model tokens.py:net",
        ["needed is (1, 5): 5 for each example, which has one label; built-in"],
    ),
    "vocabulary": (
        "run --dataset play.txt --length 2 --model tokens.py:small",
        ["its embedding has 4 rows, and the tokens reach 4: they must be less than 4"],
    ),
    "file for a preset": (
        "run ./notes",
        ["is neither a preset nor a .yaml file: the name of a file must end in .yaml."],
    ),
    "near file": ("run --model tokns.py:net", ["(No such file", "did you mean 'tokens.py'?"]),
    "near method": ("run --method brokn.py", ["cannot be read", "did you mean 'broken.py'?"]),
    "near yaml": ("run tpyo.yaml", ["No such file", "did you mean 'typo.yaml'?"]),
    "column": ("run --dataset numbers.csv", ["numbers.csv"]),
    # parts from files
    "no file": ("run --model nowhere.py:net", ["model: 'nowhere.py:net' cannot be read"]),
    "no name": (f"run --model {stub.FILE}:nett", ["does not exist", "did you mean 'net'?"]),
    "syntax": ("run --method broken.py:METHOD", ["broken.py", "SyntaxError"]),
    "raises": ("run --method raises.py:METHOD", ["RuntimeError: no such device, raises.py line 1"]),
    "value": ("run --method plain.py:METHOD", ["is of type int, not a method"]),
    "signature": ("run --model plain.py:net", ["the parameter 'width'", "annotated"]),
    "bare": ("run --model plain.py", ["plain.py:NAME", "net"]),
    "kind": (f"run --model {stub.FILE}:METHOD", ["is a method, not a model"]),
    "own setting": (f"run --method {stub.FILE}:METHOD --sparsity 2", ["method.sparsity", "'2'"]),
    # describe, list, validate, sweep
    "describe": ("describe fedipp", ["there is no part 'fedipp'", "did you mean 'feddip'?"]),
    "describe kind": ("describe method/lenet5", ["'lenet5' is a model, not a method"]),
    "describe file": ("describe nowhere.py:METHOD", ["nowhere.py", "cannot be read"]),
    "describe module": ("describe nowhere.at.all:METHOD", ["cannot be imported"]),
    "list": ("list modle", ["the kind must be one of", "did you mean 'model'?"]),
    "validate": ("validate nowhere.yaml", ["nowhere.yaml", "No such file"]),
    "validate preset": ("validate quik", ["did you mean 'quick'?"]),
    "validate flat": ("validate flat.yaml", ["since schema 2 it is method"]),
    "validate name": ("validate typo.yaml", ["did you mean method.sparsity?"]),
    "validate part": ("validate part.yaml", ["client.optimizer", "adam", "'adamw'"]),
    "validate variant": ("validate variant.yaml", ["variant of 'feddip'", "'without'"]),
    "validate foreign": ("validate foreign.yaml", ["'method.sparsity'", "not of fedavg"]),
    "validate sweep": ("validate sweep.yaml", ["method.sparsity", "1.5 (from sweep.yaml)"]),
    "validate case": ("validate case.yaml", ["method (from case.yaml)", "did you mean 'feddip'?"]),
    "sweep": ("sweep cohort.yaml", ["federation.cohort_size must be at most", "(4), got 9"]),
    "sweep preset": ("sweep quick", ["'quick' is no sweep", "a .yaml file"]),
    "sweep file": ("sweep nowhere.yaml", ["nowhere.yaml", "No such file"]),
    "jobs": ("sweep sweep.yaml --jobs 0", ["0 is not in the range"]),
    "compare": ("compare nowhere", ["nowhere", "no such folder"]),
    "compare to": ("compare taken --to-accuracy nan", ["--to-accuracy must be a finite number"]),
    "export": ("export nowhere", ["nowhere"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_and_makes_no_folder(capsys, tmp_path, monkeypatch, name):
    args, words = BAD[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    for file, text in FILES.items():
        pathlib.Path(file).write_text(text)
    for folder in ("taken", "png", "digit"):
        pathlib.Path(folder).mkdir()
    pathlib.Path("taken/thesis.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(args.split())
    _, err = capsys.readouterr()
    assert stop.value.code == 2
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in sentence, sentence
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
