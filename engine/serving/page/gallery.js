// The gallery: runs with their progress, previews and results, and the buttons that use a result as input.

import { wordsOf } from "./caption.js";
import { $, copyOf } from "./dom.js";

const MOST_SAMPLES = 512; // beyond it, the oldest runs are removed

let model, use;

/** Sets up the gallery of a model; `takers` has a function each for an image, a sketch, a caption and a seed to use. */
export function startGallery(served, takers) {
  [model, use] = [served, takers];
}

/** Tells screen readers. */
export const announce = (text) => ($("progress-announcement").textContent = text);
const showState = (run, text) => (run.article.querySelector(".run-state").textContent = text);
const samplesOf = (run) => [...run.article.querySelectorAll(".sample")];
export const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Shows a run that begins: {body, words, article}; `words` are those of the caption that are given, null for others. */
export function showRun(run, title, cancel) {
  for (const old of document.querySelectorAll(".run.stopped")) old.remove();
  run.article.classList.add("running");
  run.article.querySelector("h3").textContent = title;
  run.article.querySelector(".samples").append(...Array.from({ length: run.body.num }, () => copyOf("sample-template")));
  for (const frame of run.article.querySelectorAll(".frame")) frame.hidden = model.modalities.every(({ name }) => name !== "image");
  showState(run, "Sending");
  run.article.querySelector(".run-cancel").addEventListener("click", cancel);
  $("welcome").hidden = true;
  $("gallery").prepend(run.article);
  const { top } = run.article.getBoundingClientRect();
  if (top < 0 || top > innerHeight * 0.8) { // on a phone the results are below
    $("results").scrollIntoView({ behavior: isCalm() ? "auto" : "smooth" });
  }
}

export function showQueued(run, { id, position }) {
  run.id = id;
  const text = position ? `Waiting: ${position} ${position === 1 ? "sample" : "samples"} ahead` : "Starting";
  showState(run, text);
  announce(`${text}.`);
}

export function showProgress(run, { done, total }) {
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

export function showPreview(run, { samples }) {
  const shown = samplesOf(run);
  for (const { index, image: drawn, text } of samples) {
    if (drawn) {
      const picture = shown[index].querySelector("img");
      Object.assign(picture, { src: `data:image/png;base64,${drawn}`, hidden: false });
    }
    if (text) shown[index].querySelector(".caption").textContent = text;
  }
}

export function showResult(run, { samples, timings }) {
  const shown = samplesOf(run);
  samples.forEach((sample, i) => showSample(run, sample, shown[i]));
  run.article.classList.remove("running");
  const gallery = $("gallery");
  while (gallery.childElementCount > 1 && gallery.querySelectorAll(".sample").length > MOST_SAMPLES) removeRun(gallery.lastElementChild);
  const count = `${samples.length} ${samples.length === 1 ? "sample" : "samples"}`;
  showState(run, `${count} · ${run.body.steps} steps · ${timings.total_s.toFixed(1)} s`);
  announce(`Done: ${count}. The first: ${samples[0].text || "an image"}.`);
}

/** Removes a run that failed. */
export function showFailed(run) {
  run.article.remove();
  showWelcome();
  announce("Failed.");
}

export function showCancelled(run) {
  run.article.classList.replace("running", "stopped");
  showState(run, run.step ? `Cancelled at ${run.step.toLowerCase()}` : "Cancelled");
  announce("Cancelled.");
}

const showWelcome = () => ($("welcome").hidden = $("gallery").childElementCount > 0);

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
    find(".use-image").addEventListener("click", () => use.image(blob));
  }
  for (const control of [find(".download"), find(".use-image")]) control.hidden = !encoded;
  for (const { name } of model.modalities.filter((m) => m.name !== "image" && m.kind === "image")) {
    const other = Object.assign(new Image(), { className: "sharp other", alt: name, title: name });
    other.src = `data:image/png;base64,${sample.outputs[name]}`;
    find(".frame").after(other);
    if (name !== "sketch") continue;
    find(".use-sketch").hidden = false;
    find(".use-sketch").addEventListener("click", () => use.sketch(other));
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
  find(".use-seed").addEventListener("click", () => use.seed(seed));
  find(".use-caption").hidden = !text;
  find(".use-caption").addEventListener("click", () => use.caption(text));
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

function removeRun(article) {
  for (const link of article.querySelectorAll(".download[href]")) URL.revokeObjectURL(link.href);
  article.remove();
}

export function clearGallery() {
  for (const article of document.querySelectorAll(".run:not(.running)")) removeRun(article);
  showWelcome();
  $("results").focus();
}
