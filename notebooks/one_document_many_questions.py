# %% [markdown]
# # One document, many questions
#
# A chat about a document, and a batch of questions about it: the document is encoded once, and every answer uses it.
# The model is one that fits the runtime: Qwen3-0.6B-diffusion on a CPU or a T4, LLaDA-8B in 8 bits on an L4, an A100
# or a TPU v5e. Without a network it is the small model that comes with the package; the outputs that are saved here are
# that model's, on a CPU.

# %%
QWEN, LLADA = "dllm-collection/Qwen3-0.6B-diffusion-mdlm-v0.1", "GSAI-ML/LLaDA-8B-Instruct"
MODEL, FORMAT, PEOPLE, QUESTIONS, STEPS = {
    "CPU": (QWEN, {"dtype": "float32", "mask_id": 151669}, 8, 4, 8),  # slow here: few questions
    "T4": (QWEN, {"dtype": "float32", "mask_id": 151669}, 24, 64, 16),  # a T4 has no bfloat16
    "L4": (LLADA, {"dtype": "bfloat16", "quantize": "w8a8"}, 32, 64, 16),
    "A100": (LLADA, {"dtype": "bfloat16", "quantize": "w8a8"}, 32, 64, 16),
    "v5e-1": (LLADA, {"dtype": "bfloat16", "quantize": "w8a8"}, 32, 64, 16),
}[RUNTIME]

# %% [markdown]
# ## The model

# %%
import time

import numpy as np

from bicache_jax import BicacheError, CacheConfig, Engine, SamplingConfig, load_model
from bicache_jax.display import Table, results, statistics, watch
from bicache_jax.example import task
from bicache_jax.measure.plots import bars
from bicache_jax.measure.profile import profile_model

try:
    model = load_model(MODEL, **FORMAT)
except BicacheError as error:
    print(f"{error}\nThe bundled model takes its place.")
    MODEL, PEOPLE, QUESTIONS, STEPS = "example", 12, 64, 16
    model = load_model(MODEL)
bundled = MODEL == "example"
model

# %%
TURNS = 4  # of the chat
LENGTH = 16  # tokens of an answer

# %% tags=["quick"]
QUESTIONS, TURNS = 6, 2

# %% [markdown]
# ## The document
#
# Facts about people, drawn by chance so that no model has seen them, with questions whose answers are known.

# %%
drawn = task.draw_document(np.random.default_rng(task.FIRST_HELD_OUT + 3), people=PEOPLE, facts=4)
document = " ".join(drawn.words)
asked = task.pick_questions(np.random.default_rng(0), drawn, QUESTIONS)
if not bundled:  # which knows neither punctuation nor instructions
    document = "Answer in as few words as possible, from these facts alone. " + document.replace(" .", ".")


def written(question):
    """A question as the model reads it."""
    return " ".join(question.words) + ("" if bundled else "?")


print(document)

# %% [markdown]
# ## Where to put the boundary
#
# BiCache reuses the document as it was encoded alone in the layers below the *boundary*. A table says which, by the
# share *r* of the sequence that is shared. LLaDA-8B has a published one, the bundled model its own; any other model
# gets one here, from how far its keys and values change when a question follows. (Similarity is a guess. The third
# notebook, `is_bicache_safe_for_my_model.ipynb`, checks it against answers.)

# %%
system = {"role": "system", "content": document}
conversations = [[system, {"role": "user", "content": written(question)}] for question in asked]
table = model.boundaries
if table is None:
    table = profile_model(model, conversations, response=LENGTH, samples=8).table
ratios = sorted(table)
Table(("r, %, from", *map(str, ratios)), [("boundary b", *(table[r] for r in ratios))])

# %% [markdown]
# ## A chat that keeps its document
#
# `prefixes.add` names the document as the prefix of every conversation that begins with it; `prefix_len` says that a
# turn keeps this prefix, however long the conversation has grown. (Without it the prefix of a turn is everything before
# the last message. With full attention that is another encoding in every turn.)

# %%
sampling = SamplingConfig(gen_length=LENGTH, steps=STEPS, early_stop=True)
engine = Engine(model, cache=CacheConfig(policy="bicache", table=table), sampling=sampling)
prefix_len = engine.prefixes.add([system])

conversation, turns = [system], []
for question in asked[:TURNS]:
    conversation.append({"role": "user", "content": written(question)})
    started = time.perf_counter()
    request = {"id": written(question), "messages": conversation, "prefix_len": prefix_len}
    (answer,) = watch(engine.stream(request))
    seconds = time.perf_counter() - started
    turns.append([answer.id, answer.text, " ".join(question.answer), answer.cached_tokens, seconds])
    conversation.append({"role": "assistant", "content": answer.text})
Table(("question", "answer", "right", "tokens found in the cache", "seconds"), turns)

# %% [markdown]
# The first turn encodes the document and compiles the programs. The others find the document; a turn whose
# conversation has outgrown a size of programs compiles once more.

# %%
statistics(engine)

# %% [markdown]
# ## A batch of questions
#
# All questions at once, each a conversation of its own with the same document. First what the engine plans:

# %%
batch = [
    {"id": written(question), "messages": messages, "prefix_len": prefix_len}
    for question, messages in zip(asked, conversations, strict=True)
]
engine.plan(batch)

# %%
found = watch(engine.stream(batch), rows=12, total=len(batch))

# %% [markdown]
# ## Memory and speed
#
# The same batch with and without the cache, once each, with everything compiled before. An answer counts as right if
# the words of the expected one are in it. Memory is what is planned for the largest batch; `gain` is the ratio of
# counted operations, which no speed-up can pass.

# %%
right = {written(question): set(question.answer) for question in asked}
rows, speed = [], {}
for policy in ("none", "bicache"):
    cache = CacheConfig(policy="none") if policy == "none" else engine.cache
    other = Engine(model, cache=cache, sampling=sampling)
    other.warmup(batch)
    started = time.perf_counter()
    given = other.generate(batch)
    seconds = time.perf_counter() - started
    plan = other.plan(batch)
    correct = sum(right[r.id] <= set(r.text.replace(".", " ").replace(",", " ").split()) for r in given)
    answered = f"{correct} of {len(given)}"
    speed[policy] = len(given) / seconds
    rows.append((policy, answered, seconds, speed[policy], plan.peak.total / 2**20, plan.gain))
Table(("policy", "right", "seconds", "answers/s", "memory, MiB", "gain"), rows)

# %%
bars(speed, label="answers/s", title=f"{model.name}, {len(batch)} questions about one document")

# %%
results(found[:8])
