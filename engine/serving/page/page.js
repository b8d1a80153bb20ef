// The page of the service: what is given, what is generated, one run at a time, and a gallery of its results.

import { addTyped, addWords, allWords, caption, isGenerated, prompt, setCaption, showChips, startCaption, wordsOf } from "./caption.js";
import { $, copyOf, on } from "./dom.js";
import {
  clearGallery, isCalm, showCancelled, showFailed, showPreview, showProgress, showQueued, showResult, showRun, startGallery,
} from "./gallery.js";
import { generatedShare, giveImage, image, removeImage, setSize, showImage, startImage, undoMask } from "./image.js";
import { maskURL, PRESETS, presetOf } from "./mask.js";
import { call, eventsOf, Failure, forgetWords, token, wordsFrom } from "./service.js";
import { sketchPad } from "./sketch.js";

const MOST_BYTES = 50e6; // of a file; its image is cropped and resized here, and only that is sent
const TOGETHER = JSON.stringify("together"); // an order
const EXAMPLES = ["red heart", "woman astronaut: medium skin tone", "_ cat face"];

const model = { id: "", size: 64, words: 16, vocabulary_size: 0, modalities: [], defaults: {}, limits: {} };
let running = null; // the run that is under way, see generate()

const has = (modality) => model.modalities.some(({ name }) => name === modality);

// ------------------------------------------------------------------------------------------------------ Errors

const FIELDS = { // where an error about an argument is shown, and the control it belongs to
  prompt: ["caption-error", "word"],
  image: ["image-error", "choose"],
  mask: ["image-error", "choose"],
  sketch: ["sketch-error", "choose-sketch"],
};
for (const id of ["num", "steps", "seed", "guidance", "order"]) FIELDS[id] = [`${id}-error`, id];

function showError(field, message) {
  const [place, control] = FIELDS[field] ?? ["error"];
  if ($(place).textContent !== message) $(place).textContent = message; // else it is announced again
  $(place).hidden = false;
  if (!control) return;
  $(control).setAttribute("aria-invalid", "true");
  if ($("options").contains($(control))) $("options").open = true;
}

function clearError(field) {
  const [place, control] = FIELDS[field] ?? ["error"];
  $(place).hidden = true;
  if (control) $(control).removeAttribute("aria-invalid");
}

function clearErrors() {
  for (const field of ["", ...Object.keys(FIELDS)]) clearError(field);
}

function report(error) {
  if (error.status === 401) return askToken(error);
  if (error.status === undefined || error.status === 503) model.id = ""; // it may come back with another model
  const { param = "", message } = error;
  const [field] = param.split(/[^a-z_]/);
  const text = field in FIELDS ? message.replace(`${param}: `, "") : message;
  showError(field, error instanceof Failure ? text : `The page failed: ${message}`);
  const control = FIELDS[field]?.[1];
  if (!control) $("error").scrollIntoView({ block: "nearest" }); // on a phone the results are in view
  else $(image.given && control === "choose" ? "replace" : control).focus();
}

function askToken(error) {
  $("token-form").hidden = false;
  $("token-error").hidden = token.get() === null;
  $("token-error").textContent = error.message;
  token.set(null);
  $("token").focus();
}

// ---------------------------------------------------------------------------------------------- Image and sketch

const latest = {}; // what was last given, by field: a larger file takes longer than one given after it
const reading = new Set(); // promises of what is still being read

/**
 * Takes a file or an element as the image or the sketch. A promise: true once it is taken, false if an error is shown,
 * null if the model has no such modality or something else was given meanwhile.
 */
function give(field, source) {
  const taken = take(field, source).finally(() => reading.delete(taken));
  reading.add(taken);
  return taken;
}

async function take(field, source) {
  latest[field] = source;
  clearError(field);
  if (!model.id) await start();
  if (!has(field)) return null;
  const isLarge = source.size > MOST_BYTES;
  const bitmap = isLarge ? null : await fitted(source).catch(() => null);
  if (latest[field] !== source) return null;
  const problem = isLarge
    ? "is larger than 50 MB. Give a smaller one."
    : "cannot be read as an image. Give a whole PNG, JPEG, WebP or GIF.";
  if (!bitmap) showError(field, `“${source.name}” ${problem}`);
  else (field === "image" ? giveImage : sketch.give)(bitmap);
  return Boolean(bitmap);
}

/** The centre of an image as the model takes it, cropped to a square and resized. */
async function fitted(source) {
  const whole = await createImageBitmap(source);
  const side = Math.min(whole.width, whole.height);
  const [x, y] = [whole.width - side, whole.height - side].map((rest) => Math.floor(rest / 2));
  const size = { resizeWidth: model.size, resizeHeight: model.size, resizeQuality: "high" };
  const bitmap = await createImageBitmap(whole, x, y, side, side, side === model.size ? {} : size);
  whole.close(); // photos take hundreds of megabytes
  return bitmap;
}

// The sketch; Ctrl Z undoes the last change of it or of the mask.
let undoLast = undoMask;
const sketch = sketchPad($("sketch"), () => {
  if (!sketch.isGiven()) latest.sketch = null; // it was cleared after a file that is still being read was given
  undoLast = sketch.undo;
  clearError("sketch");
  refresh();
});

// -------------------------------------------------------------------------------------- What will be generated

/** By modality, what of it is generated: "all", "none" or a part. */
function plan() {
  const share = generatedShare();
  const part = share > 0 && share < 1 ? (presetOf(image.mask) ?? `${Math.min(99, Math.max(1, Math.round(100 * share)))} %`) : null;
  const words = allWords();
  const blanks = words.filter(isGenerated).length;
  return {
    image: share === 0 ? "none" : (part ?? "all"),
    sketch: sketch.isGiven() ? "none" : "all",
    text: caption.left || !words.length ? "all" : blanks ? `${blanks} of ${words.length}` : "none",
  };
}

/** Names of the modalities of which so much is generated; those that the page cannot give are generated. */
const modalitiesWith = (amount, planned) =>
  model.modalities.map(({ name }) => name).filter((name) => (planned[name] ?? "all") === amount);

const isAllGiven = (planned) => modalitiesWith("none", planned).length === Math.max(1, model.modalities.length);

function sentenceOf(planned) {
  if (isAllGiven(planned)) {
    const remedies = [has("image") && "paint over a part of the image", has("text") && "blank a word"];
    const remedy = remedies.filter(Boolean).join(", or ");
    return `Everything is given. ${remedy[0].toUpperCase()}${remedy.slice(1)}.`;
  }
  const sentences = Object.entries({ image: "Image", sketch: "Sketch", text: "Words" }).filter(([name]) => has(name))
    .map(([name, label]) => `${label}: ${planned[name] === "none" ? "given" : `${planned[name]} generated`}.`);
  return sentences.join(" ");
}

function titleOf({ image: drawn, sketch: lines, text }) {
  const parts = [];
  if (has("image") && drawn !== "none") {
    parts.push(drawn === "all" ? "image" : `${drawn in PRESETS ? drawn : "part"} of the image`);
  }
  if (has("text") && text !== "none") parts.push(text === "all" ? "caption" : "words");
  if (!parts.length) parts.push("sketch");
  const given = [drawn === "none" && "the image", lines === "none" && "a sketch", text !== "all" && `“${prompt()}”`].filter(Boolean);
  const title = parts.join(" and ") + (given.length ? ` for ${given.join(" and ")}` : "");
  return title[0].toUpperCase() + title.slice(1);
}

function taskOf(planned) {
  const [known, made] = ["none", "all"].map((amount) => modalitiesWith(amount, planned));
  if (known.length + made.length < model.modalities.length) return "infill";
  return known.length ? `${known.join("+")}-to-${made.join("+")}` : "joint";
}

/** Brings the page in line with the state. */
function refresh() {
  const planned = plan();
  showImage();
  showSketch();
  showWords();
  const task = taskOf(planned);
  const isUnguided = task === "joint" && $("order").value === TOGETHER; // nothing is known that could guide
  const guidance = isUnguided ? 1 : model.defaults.guidance?.[task];
  $("guidance").placeholder = guidance === undefined ? "automatic" : `automatic (${guidance})`;
  const seed = isLocked() ? `seed ${$("seed").value}` : "random seed";
  const num = Number($("num").value);
  $("options-summary").textContent = `${num} ${num === 1 ? "sample" : "samples"} · ${$("steps").value} steps · ${seed}`;
  const sentence = sentenceOf(planned);
  if ($("summary").textContent !== sentence) $("summary").textContent = sentence; // else it is announced again
  $("generate").disabled = isAllGiven(planned);
}

function showSketch() {
  const given = sketch.isGiven();
  $("undo-sketch").disabled = !sketch.canUndo();
  $("clear-sketch").disabled = !given;
  $("sketch-hint").textContent = given ? "" : "Draw with the mouse or a finger. Without lines, the model draws the sketch.";
}

function showWords() {
  const { words, left } = caption;
  $("caption-card").classList.toggle("left", left);
  $("caption-leave").setAttribute("aria-pressed", left);
  for (const id of ["caption-leave", "clear-words"]) $(id).hidden = !words.length;
  showChips();
  $("word").placeholder = words.length ? "" : "Type words";
  $("caption-hint").textContent = words.length ? "Press a word to blank it." : "Without words, the model writes the caption.";
  $("add-blank").disabled = words.length >= model.words;
  const unknown = words.filter((entry) => entry.unknown && !isGenerated(entry)).map(({ word }) => `“${word}”`);
  if (!unknown.length || left) return;
  const does = unknown.length === 1 ? "is not a word" : "are not words";
  const remedy = "Choose known words, use blanks, or have unknown words filled in (Options).";
  showError("prompt", `${unknown.join(", ")} ${does} of this model. ${remedy}`);
}

// ------------------------------------------------------------------------------------------------------ Options

const isLocked = () => $("lock").getAttribute("aria-pressed") === "true";

function setLock(locked) {
  $("lock").setAttribute("aria-pressed", locked);
  refresh();
}

function drawSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1e6; // short enough to be read out
  clearError("seed");
  refresh();
}

function keepSeed(seed) {
  $("seed").value = seed;
  clearError("seed");
  setLock(true);
}

/** Shows what is wrong with the options; returns whether all are valid. */
function optionsAreValid() {
  const wrong = ["num", "steps", "seed", "guidance"].filter((id) => !$(id).checkValidity());
  for (const id of wrong) showError(id, `Use a${id === "guidance" ? "" : " whole"} number from ${$(id).min} to ${$(id).max}.`);
  if (wrong.length) $(wrong[0]).focus();
  return !wrong.length;
}

function requestOf({ image: drawn, sketch: lines, text }) {
  const steps = Number($("steps").value);
  const body = { num: Number($("num").value), steps, seed: Number($("seed").value), stream: true };
  body.preview_every = Math.max(1, Math.round(steps / 8));
  if ($("guidance").value) body.guidance = Number($("guidance").value);
  if ($("order").value) body.order = JSON.parse($("order").value);
  if (text !== "all") body.prompt = prompt();
  if (text !== "all" && $("fill-unknown").checked) body.unknown_words = "fill";
  if (lines === "none") body.sketch = sketch.data();
  if (drawn === "all") return body;
  body.image = $("canvas").toDataURL("image/png");
  if (drawn === "none") return body;
  return { ...body, mask: maskURL(image.mask) };
}

// -------------------------------------------------------------------------------------------------------- A run

async function generate() {
  if (!model.id) await start(); // it is under way, or has failed
  const taken = await Promise.all(reading);
  if (running || !model.id || taken.includes(false)) return;
  addTyped();
  clearErrors();
  refresh(); // shows the unknown words again, too
  if ($("generate").disabled || !optionsAreValid()) return;
  if (!isLocked()) drawSeed();
  const planned = plan();
  running = {
    controller: new AbortController(),
    body: requestOf(planned),
    words: planned.text === "all" ? [] : caption.words.map(({ word, blank }) => (blank ? null : word)), // that are given
    article: copyOf("run-template"),
    step: "",
  };
  showRun(running, titleOf(planned), cancel);
  showWhatRuns();
  try {
    await watch(running);
  } catch (error) {
    if (error.name === "AbortError") showCancelled(running);
    else {
      showFailed(running);
      report(error);
    }
  } finally {
    running = null;
    showWhatRuns();
  }
}

/** Sends the request and shows what the service tells about it. Raises Failure, and AbortError if it is cancelled. */
async function watch(run) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(run.body) };
  const response = await call("v1/infill", { ...options, signal: run.controller.signal });
  for await (const { event, data } of eventsOf(response)) {
    if (event === "queued") showQueued(run, data);
    else if (event === "progress") showProgress(run, data);
    else if (event === "preview") showPreview(run, data);
    else if (event === "result") {
      showResult(run, data);
      if (data.model !== model.id) start(); // the service was started anew
      return;
    }
    else if (event === "error") throw new Failure(data.error ?? data);
  }
  throw new Failure({ message: "The connection ended before the result came. Try again." });
}

function cancel() {
  if (!running) return;
  running.controller.abort();
  if (running.id) call(`v1/requests/${running.id}`, { method: "DELETE" }).catch(() => {}); // it may be done by now
}

/** Shows Generate or Cancel, whichever can be used; the focus moves along. */
function showWhatRuns() {
  const hadFocus = document.activeElement.matches("#generate, #cancel, .run-cancel");
  $("cancel").hidden = !running;
  $("generate").hidden = Boolean(running);
  $("clear-gallery").hidden = !$("gallery").querySelector(".run:not(.running)");
  if (hadFocus) $(running ? "cancel" : "generate").focus({ preventScroll: true });
}

// ------------------------------------------------------------------------------------------- Use of the results

function showCard(card, control) {
  $(card).scrollIntoView({ block: "nearest", behavior: isCalm() ? "auto" : "smooth" });
  $(control).focus({ preventScroll: true });
}

startGallery(model, {
  async image(source) {
    if (await give("image", source)) showCard("image-card", "replace");
  },
  async sketch(source) {
    if (await give("sketch", source)) showCard("sketch-card", "choose-sketch");
  },
  caption(text) {
    setCaption(text);
    showCard("caption-card", "word");
  },
  seed: keepSeed,
});

// -------------------------------------------------------------------------------------------------------- Start

let starting = null; // the start that is under way

const start = () => (starting ??= showModel().finally(() => (starting = null)));

/** Asks the service which model it has, and sets the page up for it. */
async function showModel() {
  clearErrors();
  forgetWords();
  $("about").textContent = "Loading the model";
  try {
    const answer = await (await call("v1/models")).json();
    Object.assign(model, answer.data[0]);
    model.size = Number.parseInt(model.size, 10); // of "64x64"
  } catch (error) {
    $("about").textContent = "No model";
    return report(error);
  }
  const words = model.vocabulary_size.toLocaleString("en");
  const about = [model.id, has("image") && `${model.size}-pixel images`, has("text") && `${words} words`];
  $("about").textContent = about.filter(Boolean).join(" · ");
  if (has("image")) setSize(model.size);
  for (const id of ["num", "steps"]) { // a number that was typed before, after an earlier start, stays
    $(id).max = model.limits[id] ?? $(id).max;
    $(id).defaultValue = Math.min(model.defaults[id] ?? $(id).defaultValue, $(id).max);
  }
  const orders = model.modalities.map(({ name }) => new Option(`${name} first`, JSON.stringify([name])));
  $("order").replaceChildren($("order").options[0], ...orders, new Option("together", TOGETHER));
  $("image-card").hidden = !has("image");
  $("caption-card").hidden = !has("text");
  $("sketch-card").hidden = !has("sketch");
  refresh();
  showExamples();
}

/** Captions to begin with, of those whose words the model knows. */
async function showExamples() {
  const isKnown = async (word) => word === "_" || (await wordsFrom(word).catch(() => [])).includes(word);
  const texts = [];
  for (const text of EXAMPLES) {
    const known = await Promise.all(wordsOf(text).map(isKnown));
    if (known.every(Boolean)) texts.push(text);
  }
  const items = ["", ...texts].map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text || "Surprise me" });
    if (text.startsWith("_")) {
      const blank = Object.assign(document.createElement("span"), { className: "blank-key", role: "img", ariaLabel: "blank" });
      button.replaceChildren(blank, text.slice(2));
    }
    button.addEventListener("click", () => {
      removeImage();
      sketch.clear();
      setCaption(text);
      generate();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  $("examples").replaceChildren(...items);
}

on("choose", "click", () => $("file").click());
on("replace", "click", () => $("file").click());
on("remove", "click", () => {
  removeImage();
  $("choose").focus();
});
on("file", "change", () => {
  if ($("file").files.length) give("image", $("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
on("choose-sketch", "click", () => $("sketch-file").click());
on("sketch-file", "change", () => {
  if ($("sketch-file").files.length) give("sketch", $("sketch-file").files[0]);
  $("sketch-file").value = "";
});
on("undo-sketch", "click", sketch.undo);
on("clear-sketch", "click", sketch.clear);
on("add-blank", "click", () => {
  addTyped();
  addWords("_");
});
on("clear-words", "click", () => {
  setCaption("");
  $("word").focus();
});
on("caption-leave", "click", () => {
  caption.left = !caption.left;
  clearError("prompt");
  refresh();
});

for (const id of ["num", "steps", "guidance", "order"]) {
  on(id, "input", () => {
    clearError(id);
    refresh();
  });
}
on("seed", "input", () => {
  clearError("seed");
  setLock(true); // a typed seed is kept
});
on("dice", "click", drawSeed);
on("lock", "click", () => setLock(!isLocked()));
on("fill-unknown", "change", () => {
  clearError("prompt");
  refresh();
});

on("composer", "submit", (event) => {
  event.preventDefault();
  generate();
});
// Generate and Cancel take each other's place: the second half of a double click is for neither.
on("generate", "click", (event) => event.detail > 1 && event.preventDefault());
on("cancel", "click", (event) => event.detail > 1 || cancel());
on("clear-gallery", "click", () => {
  clearGallery();
  showWhatRuns();
});
on("token-form", "submit", (event) => {
  event.preventDefault();
  token.set($("token").value.trim());
  $("token-form").hidden = true;
  model.id ? generate() : start();
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && event.repeat) return event.preventDefault(); // else it would cancel what it began
  const typing = event.target.matches("input:is([type=text], [type=number], [type=password])");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    cancel();
  } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !typing) {
    event.preventDefault();
    undoLast();
  }
});
document.addEventListener("paste", (event) => {
  const { files: [file], types } = event.clipboardData;
  if (!file || (types.includes("text/plain") && event.target.matches("input"))) return; // text with a picture of it
  event.preventDefault();
  give("image", file);
});
const isTextForField = ({ dataTransfer, target }) => !dataTransfer.types.includes("Files") && target.matches("input");
document.addEventListener("dragover", (event) => {
  if (isTextForField(event)) return;
  event.preventDefault();
  $("stage").classList.toggle("over", event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", (event) => event.relatedTarget || $("stage").classList.remove("over"));
document.addEventListener("drop", (event) => {
  if (isTextForField(event)) return; // else the browser would leave the page for what is dropped
  event.preventDefault();
  $("stage").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) give(event.target.closest("#sketch-card") ? "sketch" : "image", file);
});

startImage(() => {
  if (!image.given) latest.image = null; // it was removed
  if (image.undos.length) undoLast = undoMask;
  clearError("image");
  refresh();
});
startCaption(() => {
  clearError("prompt");
  refresh();
});
drawSeed();
start();
