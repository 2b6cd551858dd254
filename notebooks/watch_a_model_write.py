# %% [markdown]
# # Watch a diffusion language model write
#
# A diffusion language model does not write from left to right. It starts from a response of masks, and every step
# decides the positions it is surest of. Because each token sees all others, text that many prompts begin with cannot be
# cached as in an ordinary language model; [BiCache](https://arxiv.org/abs/2606.07571) caches it in the layers where
# that does little harm.
#
# This notebook loads the small model that comes with the package (nothing is downloaded, a CPU will do), asks it
# several questions about one document, and measures what the cache gains.

# %%
MODEL = "example"  # the bundled model: questions about short documents

# %% [markdown]
# ## A model and a document

# %%
import numpy as np

from bicache_jax import CacheConfig, Engine, SamplingConfig, load_model
from bicache_jax.display import Table, results, statistics, watch
from bicache_jax.example import task

model = load_model(MODEL)
model

# %%
ASKED = 12  # questions
TIMED = 36  # questions on which speed is measured
TURNS = 3  # how often

# %% tags=["quick"]
ASKED = TIMED = 6  # the shapes of all notebooks' small runs: programs are compiled once
TURNS = 1

# %%
document = task.draw_document(np.random.default_rng(task.FIRST_HELD_OUT), people=12, facts=4)
text = " ".join(document.words)
print(text)

# %% [markdown]
# The model was not trained on this document. It knows facts of four kinds, and questions such as these; what is right
# is known, too.

# %%
questions = task.pick_questions(np.random.default_rng(1), document, TIMED)
requests = [
    {"id": (ask := " ".join(q.words)), "prompt": f"{text} {ask}", "answer": q.accepted, "kind": q.kind}
    for q in questions
]
Table(("question", "answer"), [(" ".join(q.words), " ".join(q.answer)) for q in questions[:ASKED]])

# %% [markdown]
# ## What would be done
#
# `prefixes.add` says that prompts will begin with the document. A plan costs nothing: *P* tokens are the shared prefix,
# *U* the rest of a prompt and the response, *b* is the boundary, the number of layers in which the prefix is reused as
# it is.

# %%
engine = Engine(model, sampling=SamplingConfig(gen_length=16))
shared = engine.prefixes.add(text)
engine.plan(requests[:ASKED])

# %% [markdown]
# ## Watch it write
#
# Grey cells are masked. With `every=1` each step is shown. In a saved notebook the last picture stays. (The first run
# of a shape waits for the compiler.)

# %%
found = watch(engine.stream(requests[:ASKED], every=1), total=ASKED)

# %% [markdown]
# The same again, and one of the questions step by step. (The model often settles first where its answer ends. What
# comes after the end is not shown.)

# %%
first = requests[0]["id"]
frames = [frame for frame in engine.stream(requests[:ASKED], every=1) if frame.id == first]
Table(("step", first), [(frame.steps, frame.text) for frame in frames])

# %% [markdown]
# ## What was found in the cache
#
# `cached` counts the tokens of a prompt whose keys and values were there already. The document was encoded once, with
# the first batch; the questions after that found it.

# %%
results(engine.generate(requests[:ASKED]), answers={r["id"]: r["answer"] for r in requests})

# %%
statistics(engine)

# %% [markdown]
# ## With and without the cache
#
# The same questions under three policies: `none` keeps nothing, `naive` reuses the prefix in all layers, `bicache`
# below the boundary. (For this model and a prompt that is nine tenths document, the boundary is the last layer, so
# these two are the same.) Speed is measured in turns, with nothing left to compile, and in every turn the document is
# encoded again. How much is gained depends on the share of the prompt that is shared, on the model and on the machine;
# `limit` is what counted operations allow. So small a model spends much of its time between operations.

# %%
from bicache_jax.display import evaluation
from bicache_jax.measure.evaluate import evaluate, items_of
from bicache_jax.measure.plots import bars

questions = [{**request, "prefix_len": shared} for request in requests]
items = items_of(questions, model, engine.sampling, "these questions")
measured = evaluate(
    model,
    items,
    ["none", "naive", "bicache"],
    cache=CacheConfig(),
    sampling=engine.sampling,
    timed=TIMED,
    turns=TURNS,
)
bars({found["policy"]: found["tokens_per_s"] for found in measured}, label="tokens/s")

# %%
evaluation(measured)

# %% [markdown]
# Next: a real model and a batch of questions in `one_document_many_questions.ipynb`; and before you use the cache with
# a model of your own, `is_bicache_safe_for_my_model.ipynb`.
