// The caption: words that are typed become chips, which can be blanked and removed; known words are suggested.

import { $, copyOf, on } from "./dom.js";
import { wordsFrom } from "./service.js";

export const caption = { words: [], left: false }; // of {word, blank, unknown}; left: to the model, as if there were none

let changed; // is called after each change

/** Sets up the field; `onChange` is called after each change. */
export function startCaption(onChange) {
  changed = onChange;
  on("word", "input", onTyping);
  on("word", "keydown", wordKey);
  on("word", "blur", closeSuggestions);
  on("chip-field", "click", (event) => event.target === $("chip-field") && $("word").focus());
}

/** Words as the service reads them: letters and digits with inner hyphens and apostrophes; "_" is a blank. */
export const wordsOf = (text) => text.normalize("NFC").toLowerCase().replaceAll("’", "'").match(/[\p{L}\p{N}]+(?:['-][\p{L}\p{N}]+)*|_+/gu) ?? [];
const entriesOf = (text) =>
  wordsOf(text).map((word) => (word[0] === "_" ? { word: "", blank: true, unknown: false } : { word, blank: false, unknown: false }));
export const allWords = () => [...caption.words, ...entriesOf($("word").value)]; // with those still being typed
export const prompt = () => allWords().map(({ word, blank }) => (blank ? "_" : word)).join(" ");
export const isGenerated = ({ blank, unknown }) => blank || (unknown && $("fill-unknown").checked);

/** Adds the words of a text, at the end. */
export function addWords(text) {
  for (const entry of entriesOf(text)) {
    caption.words.push(entry);
    if (entry.word) markUnknown(entry);
  }
  if (wordsOf(text).length) caption.left = false;
  changed();
}

async function markUnknown(entry) {
  const known = await wordsFrom(entry.word).catch(() => [entry.word]); // the service refuses it, if need be
  entry.unknown = !known.includes(entry.word);
  if (entry.unknown) changed();
}

export function setCaption(text) {
  caption.words = [];
  $("word").value = "";
  addWords(text);
}

export function addTyped() {
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
  changed();
  select(); // none: the selected word was for what was typed before
  suggest();
}

function toggleWord(index) {
  const entry = caption.words[index];
  if (!entry.word) return removeWord(index);
  entry.blank = !entry.blank;
  caption.left = false;
  changed();
}

function removeWord(index) {
  caption.words.splice(index, 1);
  changed();
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
export function showChips() {
  const state = JSON.stringify(caption.words);
  if ($("chips").dataset.shown === state) return;
  $("chips").dataset.shown = state;
  const focused = [...$("chips").children].indexOf(document.activeElement?.closest(".chip"));
  $("chips").replaceChildren(...caption.words.map(chipOf));
  $("chips").children[focused]?.firstElementChild.focus();
}

function closeSuggestions() {
  $("suggestions").hidden = true;
  $("suggestions").replaceChildren();
  $("word").setAttribute("aria-expanded", "false");
  select();
}

/** Selects a suggestion; without one, none. */
function select(option) {
  for (const other of $("suggestions").children) other.ariaSelected = String(other === option);
  option ? $("word").setAttribute("aria-activedescendant", option.id) : $("word").removeAttribute("aria-activedescendant");
}

async function suggest() {
  const typed = $("word").value;
  const prefix = wordsOf(typed).at(-1);
  const words = prefix && prefix !== "_" ? await wordsFrom(prefix).catch(() => []) : [];
  if ($("word").value !== typed) return; // more was typed meanwhile
  if (!words.length || document.activeElement !== $("word")) return closeSuggestions();
  const chosen = $("suggestions").querySelector("[aria-selected=true]")?.textContent; // while this list was on its way
  const options = words.map((word, i) => {
    const option = document.createElement("li");
    Object.assign(option, { id: `suggestion-${i}`, role: "option", textContent: word });
    option.addEventListener("mousedown", (event) => event.preventDefault()); // the word field keeps the focus
    option.addEventListener("click", () => takeSuggestion(option));
    return option;
  });
  $("suggestions").replaceChildren(...options);
  $("suggestions").hidden = false;
  $("word").setAttribute("aria-expanded", "true");
  select(options.find((option) => option.textContent === chosen));
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
  select(next);
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
