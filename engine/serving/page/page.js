// The page of the service: what is given, what is generated, one run at a time, and a gallery of its results.
// Every address is relative, so that it also works behind a proxy that adds a path.

import { sketchPad } from "./sketch.js";

const $ = (id) => document.getElementById(id);
const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);

const MOST_BYTES = 50e6; // of a file; its image is cropped and resized here, and only that is sent
const MOST_UNDOS = 50;
const MOST_SAMPLES = 512; // in the gallery; beyond it, the oldest runs are removed
const OVERLAY = 768; // pixels a side of the canvas on which the mask is shown
const EXAMPLES = ["red heart", "woman astronaut: medium skin tone", "_ cat face"];
const TOKEN = "token"; // its key in the session's storage

const model = { id: "", size: 64, words: 16, vocabulary_size: 0, modalities: [], defaults: {}, limits: {} };
const image = { given: false, left: false, mask: new Uint8Array(64 * 64), painted: null, undos: [], cursor: null };
const caption = { words: [], left: false }; // of {word, blank, unknown}
let running = null; // the run that is under way, see generate()

const has = (modality) => model.modalities.some(({ name }) => name === modality);

// ---------------------------------------------------------------------------------------------------- The service

/** An error of the service; `field` is the one that it is shown at. */
class Failure extends Error {
  constructor({ message, param }, status) {
    const field = (param ?? "").split(/[^a-z_]/)[0];
    super(field in FIELDS ? message.replace(`${param}: `, "") : message);
    this.field = field;
    this.status = status;
  }
}

async function call(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({ message: "The server does not answer. Check that it runs, then try again." });
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Failure(answer?.error ?? { message: `The server answered with status ${response.status}.` }, response.status);
}

/** Events {event, data} of a stream of server-sent events, which EventSource cannot read since it cannot POST. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true }; // the connection broke
    });
    if (done) return;
    pending += value.replaceAll("\r", "");
    const blocks = pending.split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => line.match(/^(event|data): ?(.*)$/)).filter(Boolean);
      const data = lines.filter((line) => line[1] === "data").map((line) => line[2]).join("\n");
      if (data === "[DONE]") return;
      if (data) yield { event: lines.find((line) => line[1] === "event")?.[2], data: JSON.parse(data) };
    }
  }
}

const vocabulary = new Map(); // answers of the service, by prefix

function wordsFrom(prefix) {
  const key = prefix.toLowerCase();
  if (!vocabulary.has(key)) {
    const query = new URLSearchParams({ prefix: key, limit: 8 });
    const answer = call(`v1/vocabulary?${query}`).then((response) => response.json()).then(({ words }) => words);
    vocabulary.set(key, answer);
    answer.catch(() => vocabulary.delete(key));
  }
  return vocabulary.get(key);
}

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
  showError(error.field, error instanceof Failure ? error.message : `The page failed: ${error.message}`);
  const control = FIELDS[error.field]?.[1];
  if (control) $(image.given && control === "choose" ? "replace" : control).focus();
}

function askToken(error) {
  $("token-form").hidden = false;
  $("token-error").hidden = sessionStorage.getItem(TOKEN) === null;
  $("token-error").textContent = error.message;
  sessionStorage.removeItem(TOKEN);
  $("token").focus();
}

// ------------------------------------------------------------------------------------------------ Image and mask

const pixels = $("canvas").getContext("2d", { willReadFrequently: true });
const maskCanvas = document.createElement("canvas");

const PRESETS = {
  "left half": (x) => x < model.size / 2,
  "right half": (x) => x >= model.size / 2,
  "top half": (x, y) => y < model.size / 2,
  "bottom half": (x, y) => y >= model.size / 2,
  centre: (x, y) => [x, y].every((z) => z >= model.size / 4 && z < (model.size * 3) / 4),
};

const presetMask = (name) =>
  Uint8Array.from(image.mask, (_, i) => PRESETS[name](i % model.size, Math.floor(i / model.size)));
const matchingPreset = () => Object.keys(PRESETS).find((name) => presetMask(name).every((on, i) => on === image.mask[i]));

/** Share of the image that is generated, 0 … 1. */
function generatedShare() {
  if (!image.given || image.left) return 1;
  return image.mask.reduce((sum, on) => sum + on, 0) / image.mask.length;
}

const latest = {}; // what was last given, by field: a larger file takes longer than one given after it

/** Takes a file or an element as the image or the sketch; returns whether it was, and shows an error where not. */
async function give(field, source) {
  latest[field] = source;
  clearError(field);
  if (!model.id) await start();
  if (!has(field)) return false;
  const isLarge = source.size > MOST_BYTES;
  const bitmap = isLarge ? null : await fitted(source).catch(() => null);
  if (latest[field] !== source) return false;
  const problem = isLarge ? "is larger than 50 MB" : "cannot be read as an image";
  if (!bitmap) showError(field, `“${source.name}” ${problem}. Give a whole PNG, JPEG, WebP or GIF.`);
  else (field === "image" ? showGiven : sketch.give)(bitmap);
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

/** Shows an image as the model takes it, on white. */
function showGiven(bitmap) {
  $("canvas").width = $("canvas").height = model.size;
  pixels.fillStyle = "white";
  pixels.fillRect(0, 0, model.size, model.size);
  pixels.drawImage(bitmap, 0, 0);
  Object.assign(image, { given: true, left: false, undos: [], mask: new Uint8Array(model.size ** 2) });
  refresh();
}

function removeImage() {
  latest.image = null;
  Object.assign(image, { given: false, left: false, undos: [] });
  clearError("image");
  refresh();
}

// The sketch; Ctrl Z undoes the last change of it or of the mask.
let undoLast = undo;
const sketch = sketchPad($("sketch"), () => {
  undoLast = sketch.undo;
  clearError("sketch");
  refresh();
});

/** Replaces the mask, or keeps a copy of it before a stroke changes it in place. */
function changeMask(mask = image.mask) {
  image.undos = [...image.undos.slice(1 - MOST_UNDOS), image.mask.slice()];
  image.mask = mask;
  image.left = false;
  undoLast = undo;
  clearError("mask");
  refresh();
}

function undo() {
  if (!image.undos.length) return;
  image.mask = image.undos.pop();
  image.left = false;
  refresh();
}

function choosePreset(name) {
  changeMask(matchingPreset() === name ? new Uint8Array(model.size ** 2) : presetMask(name));
}

/** Paints or erases a line of the brush's width, in pixels of the model's image. */
function stroke([x0, y0], [x1, y1]) {
  const radius = $("brush-size").valueAsNumber / 2;
  const value = document.querySelector("[name=tool]:checked").value === "paint" ? 1 : 0;
  const length = (x1 - x0) ** 2 + (y1 - y0) ** 2;
  image.mask.forEach((_, i) => {
    const [x, y] = [(i % model.size) + 0.5, Math.floor(i / model.size) + 0.5];
    const along = length && Math.min(1, Math.max(0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length));
    const [dx, dy] = [x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)];
    if (dx * dx + dy * dy <= Math.max(radius, 0.71) ** 2) image.mask[i] = value;
  });
}

function onStage(event) {
  const box = $("overlay").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * model.size, ((event.clientY - box.top) / box.height) * model.size];
}

function draw(event) {
  if (event.button || !event.isPrimary) return;
  event.preventDefault();
  document.activeElement.blur(); // from now on Ctrl Z is about the mask, not about what was typed
  $("overlay").setPointerCapture(event.pointerId);
  changeMask();
  image.painted = image.mask;
  image.cursor = onStage(event);
  stroke(image.cursor, image.cursor);
  paintOverlay();
}

function follow(event) {
  const at = onStage(event);
  const isPainting = image.painted === image.mask && $("overlay").hasPointerCapture(event.pointerId);
  if (isPainting) stroke(image.cursor ?? at, at); // not if the stroke was undone, or another image given
  image.cursor = at;
  paintOverlay();
}

/** Undoes a stroke that was the beginning of a gesture: two fingers zoom. */
function cancelStroke({ isPrimary }) {
  if (isPrimary && image.painted === image.mask) undo();
}

let overlayDue = false;

function paintOverlay() {
  if (!overlayDue) requestAnimationFrame(paintOverlayNow);
  overlayDue = true;
}

/** The mask as a tint, a hatching and an outline, through which the image stays visible. */
function paintOverlayNow() {
  overlayDue = false;
  const { size } = model;
  const accent = getComputedStyle(document.body).getPropertyValue("--mask");
  const shown = image.left ? image.mask.map(() => 1) : image.mask;
  drawMask(shown, [255, 255, 255, 255], [0, 0, 0, 0]);
  $("overlay").width = $("overlay").height = OVERLAY; // this also clears it
  const context = $("overlay").getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(maskCanvas, 0, 0, OVERLAY, OVERLAY);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = hatching(context, accent);
  context.fillRect(0, 0, OVERLAY, OVERLAY);
  context.globalCompositeOperation = "source-over";
  context.scale(OVERLAY / size, OVERLAY / size);
  if (!image.left) outline(context, edgesOf(shown), accent);
  if (image.cursor) {
    const ring = new Path2D();
    ring.arc(...image.cursor, Math.max($("brush-size").valueAsNumber / 2, 0.71), 0, 2 * Math.PI);
    outline(context, ring, accent);
  }
}

function hatching(context, accent) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 20;
  const lines = tile.getContext("2d");
  lines.globalAlpha = 0.16;
  lines.fillStyle = accent;
  lines.fillRect(0, 0, 20, 20);
  for (const [colour, alpha, width] of [["white", 0.75, 5], [accent, 0.95, 2.5]]) {
    Object.assign(lines, { strokeStyle: colour, globalAlpha: alpha, lineWidth: width });
    lines.beginPath();
    for (const shift of [-20, 0, 20]) {
      lines.moveTo(shift - 5, 25);
      lines.lineTo(shift + 25, -5);
    }
    lines.stroke();
  }
  return context.createPattern(tile, "repeat");
}

function edgesOf(mask) {
  const { size } = model;
  const path = new Path2D();
  const isOn = (x, y) => x >= 0 && y >= 0 && x < size && y < size && mask[y * size + x];
  mask.forEach((on, i) => {
    if (!on) return;
    const [x, y] = [i % size, Math.floor(i / size)];
    for (const [dx, dy, ax, ay, bx, by] of [[-1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 1, 1], [0, -1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1]]) {
      if (isOn(x + dx, y + dy)) continue;
      path.moveTo(x + ax, y + ay);
      path.lineTo(x + bx, y + by);
    }
  });
  return path;
}

function outline(context, path, accent) {
  const pixel = model.size / OVERLAY;
  context.lineCap = "square";
  for (const [colour, width] of [["white", 6], [accent, 3]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: width * pixel });
    context.stroke(path);
  }
}

function drawMask(mask, on, off) {
  maskCanvas.width = maskCanvas.height = model.size;
  const data = new ImageData(model.size, model.size);
  mask.forEach((value, i) => data.data.set(value ? on : off, 4 * i));
  maskCanvas.getContext("2d").putImageData(data, 0, 0);
}

// ------------------------------------------------------------------------------------------------------ Caption

/** Words as the service reads them: letters and digits with inner hyphens and apostrophes; "_" is a blank. */
const wordsOf = (text) => text.normalize("NFC").toLowerCase().replaceAll("’", "'").match(/[\p{L}\p{N}]+(?:['-][\p{L}\p{N}]+)*|_+/gu) ?? [];
const entriesOf = (text) =>
  wordsOf(text).map((word) => (word[0] === "_" ? { word: "", blank: true, unknown: false } : { word, blank: false, unknown: false }));
const allWords = () => [...caption.words, ...entriesOf($("word").value)]; // with those still being typed
const prompt = () => allWords().map(({ word, blank }) => (blank ? "_" : word)).join(" ");
const isGenerated = ({ blank, unknown }) => blank || (unknown && $("fill-unknown").checked);

function addWords(text) {
  for (const entry of entriesOf(text)) {
    caption.words.push(entry);
    if (entry.word) markUnknown(entry);
  }
  if (wordsOf(text).length) caption.left = false;
  clearError("prompt");
  refresh();
}

async function markUnknown(entry) {
  const known = await wordsFrom(entry.word).catch(() => [entry.word]); // the service refuses it, if need be
  entry.unknown = !known.includes(entry.word);
  if (entry.unknown) refresh();
}

function setCaption(text) {
  caption.words = [];
  $("word").value = "";
  addWords(text);
}

function addTyped() {
  const text = $("word").value;
  $("word").value = "";
  closeSuggestions();
  addWords(text);
}

/** Turns words into chips as soon as a space or comma ends them. */
function onTyping() {
  const [, ended, rest] = $("word").value.match(/^(.*[\s,])?(.*)$/s);
  if (ended !== undefined) {
    $("word").value = rest;
    addWords(ended);
  }
  clearError("prompt");
  refresh();
  suggest();
}

function toggleWord(index) {
  const entry = caption.words[index];
  if (!entry.word) return removeWord(index);
  entry.blank = !entry.blank;
  caption.left = false;
  clearError("prompt");
  refresh();
}

function removeWord(index) {
  caption.words.splice(index, 1);
  clearError("prompt");
  refresh();
  ($("chips").children[Math.max(0, index - 1)]?.firstElementChild ?? $("word")).focus();
}

function chipOf(entry, index) {
  const chip = copyOf("chip-template");
  const [word, remove] = chip.children;
  chip.classList.toggle("blank", entry.blank);
  chip.classList.toggle("unknown", Boolean(entry.unknown) && !entry.blank);
  word.classList.toggle("no-word", !entry.word);
  word.textContent = entry.word || "blank";
  word.setAttribute("aria-pressed", entry.blank);
  word.setAttribute("aria-label", entry.word ? `Blank “${entry.word}”` : "A blank word");
  word.title = entry.blank ? (entry.word ? `Give “${entry.word}” again` : "Remove this blank") : "Let the model fill it in";
  remove.setAttribute("aria-label", `Remove “${entry.word || "blank"}”`);
  word.addEventListener("click", () => toggleWord(index));
  remove.addEventListener("click", () => removeWord(index));
  chip.addEventListener("keydown", ({ key }) => {
    if (key === "Delete" || key === "Backspace") removeWord(index);
  });
  return chip;
}

/** Rebuilds the chips if they changed; the focus stays on the chip of its number. */
function showChips() {
  const state = JSON.stringify(caption.words);
  if ($("chips").dataset.shown === state) return;
  $("chips").dataset.shown = state;
  const focused = [...$("chips").children].indexOf(document.activeElement?.closest(".chip"));
  $("chips").replaceChildren(...caption.words.map(chipOf));
  $("chips").children[focused]?.firstElementChild.focus();
}

function closeSuggestions() {
  $("suggestions").hidden = true;
  $("word").setAttribute("aria-expanded", "false");
  $("word").removeAttribute("aria-activedescendant");
}

async function suggest() {
  const typed = $("word").value;
  const prefix = wordsOf(typed).at(-1);
  const words = prefix && prefix !== "_" ? await wordsFrom(prefix).catch(() => []) : [];
  if ($("word").value !== typed) return; // more was typed meanwhile
  if (!words.length || document.activeElement !== $("word")) return closeSuggestions();
  const options = words.map((word, i) => {
    const option = document.createElement("li");
    Object.assign(option, { id: `suggestion-${i}`, role: "option", ariaSelected: "false", textContent: word });
    option.addEventListener("mousedown", (event) => event.preventDefault()); // the word field keeps the focus
    option.addEventListener("click", () => takeSuggestion(option));
    return option;
  });
  $("suggestions").replaceChildren(...options);
  $("suggestions").hidden = false;
  $("word").setAttribute("aria-expanded", "true");
}

function takeSuggestion(option) {
  $("word").value = "";
  closeSuggestions();
  addWords(option.textContent);
  $("word").focus();
}

function selectSuggestion(step) {
  const options = [...$("suggestions").children];
  const last = options.findIndex((option) => option.ariaSelected === "true");
  const next = options[(last + step + options.length + (last < 0 && step < 0 ? 1 : 0)) % options.length];
  for (const option of options) option.ariaSelected = String(option === next);
  $("word").setAttribute("aria-activedescendant", next.id);
  next.scrollIntoView({ block: "nearest" });
}

function wordKey(event) {
  const open = !$("suggestions").hidden;
  const selected = open && $("suggestions").querySelector("[aria-selected=true]");
  if (event.ctrlKey || event.metaKey || event.isComposing) return;
  if (open && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    selectSuggestion(event.key === "ArrowDown" ? 1 : -1);
  } else if (open && event.key === "Escape") {
    event.stopPropagation();
    closeSuggestions();
  } else if (event.key === "Enter" && ($("word").value.trim() || selected)) {
    event.preventDefault();
    selected ? takeSuggestion(selected) : addTyped();
  } else if (event.key === "Backspace" && !$("word").value && caption.words.length) {
    removeWord(caption.words.length - 1);
    $("word").focus();
  }
}

// -------------------------------------------------------------------------------------- What will be generated

/** By modality, what of it is generated: "all", "none" or a part. */
function plan() {
  const share = generatedShare();
  const part = share > 0 && share < 1 ? (matchingPreset() ?? `${Math.min(99, Math.max(1, Math.round(100 * share)))} %`) : null;
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
  if (isAllGiven(planned)) return "Everything is given. Paint over a part of the image, or blank a word.";
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
  const guidance = model.defaults.guidance?.[taskOf(planned)];
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

function showImage() {
  for (const id of ["canvas", "overlay", "mask-tools", "image-leave", "replace", "remove"]) $(id).hidden = !image.given;
  $("drop").hidden = image.given;
  $("stage").classList.toggle("empty", !image.given);
  $("image-card").classList.toggle("left", image.left);
  $("image-leave").setAttribute("aria-pressed", image.left);
  $("undo").disabled = !image.undos.length;
  const preset = image.left ? undefined : matchingPreset();
  for (const button of document.querySelectorAll("[data-preset]")) {
    button.setAttribute("aria-pressed", button.dataset.preset === preset);
  }
  if (image.given) paintOverlay();
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
  drawMask(image.mask, [255, 255, 255, 255], [0, 0, 0, 255]);
  return { ...body, mask: maskCanvas.toDataURL("image/png") };
}

// -------------------------------------------------------------------------------------------------------- A run

async function generate() {
  if (!model.id) await start(); // it is under way, or has failed
  if (running || !model.id) return;
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
  showRun(running, titleOf(planned));
  showWhatRuns();
  try {
    await watch(running);
  } catch (error) {
    stop(running, error);
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
    else if (event === "result") return showResult(run, data);
    else if (event === "error") throw new Failure(data.error ?? data);
  }
  throw new Failure({ message: "The connection ended before the result came. Try again." });
}

function cancel() {
  if (!running) return;
  running.controller.abort();
  if (running.id) call(`v1/requests/${running.id}`, { method: "DELETE" }).catch(() => {}); // it may be done by now
}

function stop(run, error) {
  if (error.name !== "AbortError") {
    run.article.remove();
    $("welcome").hidden = $("gallery").childElementCount > 0;
    announce("Failed.");
    return report(error);
  }
  run.article.classList.replace("running", "stopped");
  showState(run, run.step ? `Cancelled at ${run.step.toLowerCase()}` : "Cancelled");
  announce("Cancelled.");
}

// ------------------------------------------------------------------------------------------- Results of the runs

const announce = (text) => ($("progress-announcement").textContent = text);
const showState = (run, text) => (run.article.querySelector(".run-state").textContent = text);
const samplesOf = (run) => [...run.article.querySelectorAll(".sample")];
const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function showRun(run, title) {
  for (const old of document.querySelectorAll(".run.stopped")) old.remove();
  run.article.classList.add("running");
  run.article.querySelector("h3").textContent = title;
  run.article.querySelector(".samples").append(...Array.from({ length: run.body.num }, () => copyOf("sample-template")));
  for (const frame of run.article.querySelectorAll(".frame")) frame.hidden = !has("image");
  showState(run, "Sending");
  run.article.querySelector(".run-cancel").addEventListener("click", cancel);
  $("welcome").hidden = true;
  $("gallery").prepend(run.article);
  const { top } = run.article.getBoundingClientRect();
  if (top < 0 || top > innerHeight * 0.8) { // on a phone the results are below
    $("results").scrollIntoView({ behavior: isCalm() ? "auto" : "smooth" });
  }
}

/** Shows Generate or Cancel, whichever can be used; the focus moves along. */
function showWhatRuns() {
  const hadFocus = document.activeElement.matches("#generate, #cancel, .run-cancel");
  $("cancel").hidden = !running;
  $("generate").hidden = Boolean(running);
  $("clear-gallery").hidden = !$("gallery").querySelector(".run:not(.running)");
  if (hadFocus) $(running ? "cancel" : "generate").focus({ preventScroll: true });
}

function showQueued(run, { id, position }) {
  run.id = id;
  const text = position ? `Waiting: ${position} ${position === 1 ? "sample" : "samples"} ahead` : "Starting";
  showState(run, text);
  announce(`${text}.`);
}

function showProgress(run, { done, total }) {
  const { num } = run.body;
  const percent = Math.round((100 * done) / total);
  run.step = `Step ${Math.floor(done / num)} of ${Math.round(total / num)}`;
  showState(run, run.step);
  const bar = run.article.querySelector(".bar");
  bar.firstElementChild.style.width = `${percent}%`;
  bar.setAttribute("aria-valuenow", percent);
  bar.setAttribute("aria-valuetext", run.step);
  const quarter = Math.floor(percent / 25);
  if (quarter > (run.quarter ?? 0) && quarter < 4) announce(`${run.step}.`);
  run.quarter = quarter;
}

function showPreview(run, { samples }) {
  const shown = samplesOf(run);
  for (const { index, image: drawn, text } of samples) {
    if (drawn) {
      const picture = shown[index].querySelector("img");
      Object.assign(picture, { src: `data:image/png;base64,${drawn}`, hidden: false });
    }
    if (text) shown[index].querySelector(".caption").textContent = text;
  }
}

function showResult(run, { samples, timings }) {
  const shown = samplesOf(run);
  samples.forEach((sample, i) => showSample(run, sample, shown[i]));
  run.article.classList.remove("running");
  const gallery = $("gallery");
  while (gallery.childElementCount > 1 && gallery.querySelectorAll(".sample").length > MOST_SAMPLES) removeRun(gallery.lastElementChild);
  const count = `${samples.length} ${samples.length === 1 ? "sample" : "samples"}`;
  showState(run, `${count} · ${run.body.steps} steps · ${timings.total_s.toFixed(1)} s`);
  announce(`Done: ${count}. The first: ${samples[0].text || "an image"}.`);
}

function showSample(run, sample, item) {
  const { image: encoded, text = "", seed } = sample;
  const find = (selector) => item.querySelector(selector);
  if (encoded) {
    const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
    const blob = new Blob([bytes], { type: "image/png" });
    const url = URL.createObjectURL(blob);
    Object.assign(find("img"), { src: url, alt: text || "Generated image", hidden: false });
    const name = wordsOf(text).slice(0, 8).join("-") || "image";
    Object.assign(find(".download"), { href: url, download: `${name}-${seed}.png` });
    find(".use-image").addEventListener("click", async () => {
      if (await give("image", blob)) showCard("image-card", "replace");
    });
  }
  for (const control of [find(".download"), find(".use-image")]) control.hidden = !encoded;
  for (const { name } of model.modalities.filter((m) => m.name !== "image" && m.kind === "image")) {
    const other = Object.assign(new Image(), { className: "sharp other", alt: name, title: name });
    other.src = `data:image/png;base64,${sample.outputs[name]}`;
    find(".frame").after(other);
    if (name !== "sketch") continue;
    find(".use-sketch").hidden = false;
    find(".use-sketch").addEventListener("click", async () => {
      if (await give("sketch", other)) showCard("sketch-card", "choose-sketch");
    });
  }
  const words = (sample.words ?? []).map((word, i) => ({ ...word, generated: word.word !== run.words[i] }));
  showCaption(find(".caption"), words);
  const made = words.filter(({ generated }) => generated);
  const mean = made.reduce((sum, { confidence }) => sum + confidence, 0) / made.length;
  if (made.length) {
    const title = "How sure the model is of the words that it generated";
    const sure = Object.assign(document.createElement("span"), { className: "confidence", title });
    sure.textContent = `${Math.round(100 * mean)} % sure`;
    find(".caption").append(" ", sure);
  }
  find(".use-seed").textContent = `seed ${seed}`;
  find(".use-seed").addEventListener("click", () => keepSeed(seed));
  find(".use-caption").hidden = !text;
  find(".use-caption").addEventListener("click", () => {
    setCaption(text);
    showCard("caption-card", "word");
  });
  find(".meta").hidden = find(".use").hidden = false;
}

function showCaption(place, words) {
  const spans = words.map(({ word, confidence, generated }) => {
    const span = document.createElement("span");
    span.textContent = word;
    span.classList.toggle("generated", generated);
    span.classList.toggle("unsure", generated && confidence < 0.9);
    span.classList.toggle("guess", generated && confidence < 0.5);
    if (generated) span.title = `${Math.round(100 * confidence)} % sure`;
    return span;
  });
  place.replaceChildren(...spans.flatMap((span, i) => (i ? [" ", span] : [span])));
}

function showCard(card, control) {
  $(card).scrollIntoView({ block: "nearest", behavior: isCalm() ? "auto" : "smooth" });
  $(control).focus({ preventScroll: true });
}

function removeRun(article) {
  for (const link of article.querySelectorAll(".download[href]")) URL.revokeObjectURL(link.href);
  article.remove();
}

function clearGallery() {
  for (const article of document.querySelectorAll(".run:not(.running)")) removeRun(article);
  $("welcome").hidden = $("gallery").childElementCount > 0;
  showWhatRuns();
  $("results").focus();
}

// -------------------------------------------------------------------------------------------------------- Start

let starting = null; // the start that is under way

const start = () => (starting ??= showModel().finally(() => (starting = null)));

/** Asks the service which model it has, and sets the page up for it. */
async function showModel() {
  clearErrors();
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
  image.mask = new Uint8Array(model.size ** 2);
  $("brush-size").max = model.size / 2;
  $("brush-size").value = Math.round(model.size / 6);
  for (const id of ["num", "steps"]) { // a number that was typed before, after an earlier start, stays
    $(id).max = model.limits[id] ?? $(id).max;
    $(id).defaultValue = Math.min(model.defaults[id] ?? $(id).defaultValue, $(id).max);
  }
  const orders = model.modalities.map(({ name }) => new Option(`${name} first`, JSON.stringify([name])));
  $("order").replaceChildren($("order").options[0], ...orders, new Option("together", JSON.stringify("together")));
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

const on = (id, event, act) => $(id).addEventListener(event, act);

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
on("image-leave", "click", () => {
  image.left = !image.left;
  clearError("image");
  refresh();
});
on("overlay", "pointerdown", draw);
on("overlay", "pointermove", follow);
on("overlay", "pointerup", refresh);
on("overlay", "pointercancel", cancelStroke);
on("overlay", "pointerleave", () => {
  image.cursor = null;
  paintOverlay();
});
on("undo", "click", undo);
on("clear-mask", "click", () => changeMask(new Uint8Array(model.size ** 2)));
on("invert", "click", () => changeMask(image.mask.map((value) => 1 - value)));
for (const button of document.querySelectorAll("[data-preset]")) {
  button.addEventListener("click", () => choosePreset(button.dataset.preset));
}

on("word", "input", onTyping);
on("word", "keydown", wordKey);
on("word", "blur", closeSuggestions);
on("chip-field", "click", (event) => event.target === $("chip-field") && $("word").focus());
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
on("cancel", "click", cancel);
on("clear-gallery", "click", clearGallery);
on("token-form", "submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token-form").hidden = true;
  model.id ? generate() : start();
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
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
  const file = [...event.clipboardData.files][0];
  if (!file) return;
  event.preventDefault();
  give("image", file);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return; // a text that is dragged into a field
  event.preventDefault();
  $("stage").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || $("stage").classList.remove("over"));
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  $("stage").classList.remove("over");
  give(event.target.closest("#sketch-card") ? "sketch" : "image", file);
});

drawSeed();
start();
