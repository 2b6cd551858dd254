# %% [markdown]
# # Is BiCache safe for my model?
#
# BiCache reuses a prefix's keys and values, as they are without the text that follows, in the layers below a
# *boundary*. That saves work and is an approximation: what it costs depends on the model and on what it is asked. This
# notebook measures it for your model on your questions, and gives a verdict for every boundary.
#
# `MODEL` is a folder in Hugging Face layout or a hub id; `TASK` is a file of requests, JSON lines, each with an
# `answer`. With nothing filled in, the bundled model answers questions about documents it has never seen.

# %%
MODEL = "example"  # @param {type:"string"}
TASK = ""  # @param {type:"string"}
# A line of TASK: {"messages": [...]} or {"prompt": ..., "prefix_len": tokens}, with "answer": a text or a list of them,
# and perhaps "kind": a group of questions.
FORMAT = {"CPU": {}, "T4": {"dtype": "float32"}}.get(RUNTIME, {"dtype": "bfloat16"})
# For a model of 7 to 8 billion parameters on an L4 or a v5e-1, add "quantize": "w8a8".

# %%
import json
from pathlib import Path

from tqdm.auto import tqdm

from bicache_jax import CacheConfig, SamplingConfig, load_model
from bicache_jax.display import Table, evaluation
from bicache_jax.example import task
from bicache_jax.measure.by_boundary import accuracy_by_boundary, verdict
from bicache_jax.measure.evaluate import evaluate, items_of
from bicache_jax.measure.plots import accuracy_over_boundaries, similarity_heat_map
from bicache_jax.measure.profile import profile_model
from bicache_jax.measure.scorers import find_scorer

QUESTIONS = 200  # more of them make a verdict possible where it says "open"
SIZES = ((12, 4), (3, 2))  # people and facts of the bundled documents, which are half of them long, half short
BOUNDARIES = None  # all from 0 to L; for a model of many layers some of them, such as (4, 8, 16, 32)
GEN_LENGTH = 16  # tokens of an answer
ROWS = 10  # of a batch: as many as share a document, so that batches have one shape, and few programs are compiled
SCORER = "exact"  # how answers are compared: exact, numeric, choice, or a function as module:function
MARGIN = 0.05  # accuracy that you would give for speed; to show less than that takes more questions
TIMED = 64  # questions on which speed is measured

# %% tags=["quick"]
QUESTIONS, SIZES, BOUNDARIES, MARGIN, TIMED = 6, ((12, 4),), (8,), 1.0, 0


# %%
def read(path):
    """The requests of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


model = load_model(MODEL, **FORMAT)
if TASK:
    lines = read(Path(TASK))
else:
    lines = []
    for seed, (people, facts) in enumerate(SIZES, task.FIRST_HELD_OUT + 77):
        sizes = {"people": (people, people), "facts": (facts, facts)}
        lines += task.draw_requests(seed, QUESTIONS // len(SIZES), **sizes)
lines = lines[:QUESTIONS]
asked = ("prompt", "messages", "prefix_len")
questions = [{key: line[key] for key in asked if key in line} for line in lines]
sampling = SamplingConfig(gen_length=GEN_LENGTH)
items = items_of(lines, model, sampling, TASK or "the bundled questions")
model

# %% [markdown]
# ## 1. How far do keys and values change?
#
# The published way to a boundary: a layer is *shallow* while the keys and values that a prefix gets alone are like
# those that it gets in the whole sequence, above 0.97 of cosine similarity. b(r) counts them, for a prefix that is r
# percent of the sequence, response included.

# %%
table = profile_model(model, questions, response=GEN_LENGTH, samples=8)
table

# %%
similarity_heat_map(table)

# %% [markdown]
# ## 2. What do answers say?
#
# Similarity does not know what the model does with a layer. So the questions are asked without a cache, and with one at
# every boundary from 0 to L, the number of layers (a prefix cache as ordinary language models have it).


# %%
def measured(model, items, sampling, boundaries):
    """Accuracy at boundaries, with a bar."""
    depths = range(model.config.num_layers + 1) if boundaries is None else boundaries
    with tqdm(total=(1 + len(depths)) * len(items), unit="answer", leave=False) as bar:
        return accuracy_by_boundary(
            model,
            items,
            sampling=sampling,
            boundaries=depths,
            scorer=find_scorer(SCORER),
            batch_size=ROWS,
            progress=bar.update,
        )


rows = measured(model, items, sampling, BOUNDARIES)
accuracy_over_boundaries(rows)

# %% [markdown]
# ## 3. The verdict
#
# *safe*: at this boundary and all below it, no more than `MARGIN` is lost, at a confidence of 95 %. *unsafe*: answers
# get worse, beyond chance. *open*: too few questions to tell. (n questions that show no difference still leave one of
# 3/n possible.)

# %%
judged = verdict(rows, margin=MARGIN)
judged

# %%
chosen = sorted(set(table.table.values()))
deepest = judged.deepest()
print("deepest boundary that is safe:", "none of them" if deepest is None else deepest)
Table(("boundary that the table chooses", "verdict"), [(b, judged.judge(b)) for b in chosen])

# %% [markdown]
# Where the table goes deeper than answers allow, cap it. That is the cache to use, against no cache and a naive one:

# %%
cap = 0 if deepest is None else deepest
capped = {ratio: min(b, cap) for ratio, b in table.table.items()}
found = evaluate(
    model,
    items,
    ["none", "naive", "bicache"],
    cache=CacheConfig(table=capped),
    sampling=sampling,
    scorer=find_scorer(SCORER),
    batch_size=ROWS,
    timed=TIMED,
)
evaluation(found)

# %% [markdown]
# ## A warning: a model where similarity picks the wrong boundary
#
# `examples/trips` in the repository holds a small model that reads a document (who went from which town to which) and
# after it a rule, different for each question, that sorts the towns into regions. To know who went from one region to
# another, the document must have read the rule. It was made for this: see the README for what it shows and what not.

# %%
TRIPS_ASKED, TRIPS_BOUNDARIES = 200, None

# %% tags=["quick"]
TRIPS_ASKED, TRIPS_BOUNDARIES = 6, (2,)

# %%
TRIPS = Path("../examples/trips")
if not TRIPS.is_dir() and REPOSITORY:
    address = f"https://github.com/{REPOSITORY}"
    subprocess.run(["git", "clone", "-q", "--depth", "1", address, "repository"], check=True)
    TRIPS = Path("repository/examples/trips")
if TRIPS.is_dir():
    trips = load_model(TRIPS / "bidirectional/model", dtype="float32")
    lines = read(TRIPS / "questions.jsonl")[:TRIPS_ASKED]
    short = SamplingConfig(gen_length=8)
    items = items_of(lines, trips, short, "trips")
    questions = [{"prompt": line["prompt"], "prefix_len": line["prefix_len"]} for line in lines]
    guess = profile_model(trips, questions, response=8, samples=8)
    rows = measured(trips, items, short, TRIPS_BOUNDARIES)
    warning = verdict(rows, margin=MARGIN)
    print("similarity says b =", max(guess.table.values()))
    print("answers say b =", warning.deepest())
else:
    print("examples/trips is in the repository, not in the package:")
    print("get the repository, and run this notebook from its folder notebooks/")

# %%
accuracy_over_boundaries(rows) if TRIPS.is_dir() else None

# %%
warning if TRIPS.is_dir() else None

# %% [markdown]
# Keys and values of a layer are made before the layer reads anything, so that being alike says nothing of what the last
# layer below the boundary reads. Check a table against answers, on questions like those that you will ask.
