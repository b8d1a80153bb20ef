// The given image and its mask, which is painted on it or chosen.

import { $, on } from "./dom.js";
import { drawLine, emptyMask, presetMask, presetOf, shareOf, showMask } from "./mask.js";

const MOST_UNDOS = 50;

export const image = { given: false, left: false, size: 0, mask: null, painted: null, undos: [], cursor: null, pointer: null };

let changed; // is called after each change

/** Sets up the card; `onChange` is called after each change. */
export function startImage(onChange) {
  changed = onChange;
  setSize(64);
  on("image-leave", "click", () => {
    image.left = !image.left;
    changed();
  });
  on("overlay", "pointerdown", draw);
  on("overlay", "pointermove", follow);
  on("overlay", "pointerup", changed);
  on("overlay", "pointercancel", cancelStroke);
  on("overlay", "lostpointercapture", () => (image.pointer = null));
  on("overlay", "pointerleave", () => {
    image.cursor = null;
    paintOverlay();
  });
  on("undo", "click", undoMask);
  on("clear-mask", "click", () => changeMask(emptyMask(image.size)));
  on("invert", "click", () => changeMask(image.mask.map((value) => 1 - value)));
  for (const button of document.querySelectorAll("[data-preset]")) {
    button.addEventListener("click", () => choosePreset(button.dataset.preset));
  }
}

/** Sets the pixels a side of the images that the model takes; an image of another size is removed. */
export function setSize(size) {
  if (size === image.size) return;
  Object.assign(image, { size, mask: emptyMask(size) });
  if (image.given) removeImage();
  $("brush-size").max = size / 2;
  $("brush-size").value = Math.round(size / 6);
}

/** Share of the image that is generated, 0 … 1. */
export function generatedShare() {
  if (!image.given || image.left) return 1;
  return shareOf(image.mask);
}

/** Shows an image as the model takes it, on white. */
export function giveImage(bitmap) {
  const context = $("canvas").getContext("2d", { willReadFrequently: true });
  $("canvas").width = $("canvas").height = image.size;
  context.fillStyle = "white";
  context.fillRect(0, 0, image.size, image.size);
  context.drawImage(bitmap, 0, 0);
  Object.assign(image, { given: true, left: false, undos: [], mask: emptyMask(image.size) });
  changed();
}

export function removeImage() {
  Object.assign(image, { given: false, left: false, undos: [] });
  changed();
}

/** Replaces the mask, or keeps a copy of it before a stroke changes it in place. */
function changeMask(mask = image.mask) {
  image.undos = [...image.undos.slice(1 - MOST_UNDOS), image.mask.slice()];
  image.mask = mask;
  image.left = false;
  changed();
}

export function undoMask() {
  if (!image.undos.length) return;
  image.mask = image.undos.pop();
  image.left = false;
  changed();
}

function choosePreset(name) {
  changeMask(presetOf(image.mask) === name ? emptyMask(image.size) : presetMask(name, image.size));
}

function onStage(event) {
  const box = $("overlay").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * image.size, ((event.clientY - box.top) / box.height) * image.size];
}

const brushSize = () => $("brush-size").valueAsNumber;

function paint(from, to) {
  const value = document.querySelector("[name=tool]:checked").value === "paint" ? 1 : 0;
  drawLine(image.mask, from, to, brushSize(), value);
}

function draw(event) {
  if (event.button || !event.isPrimary || image.pointer !== null) return; // a hand may lie beside a pen
  image.pointer = event.pointerId;
  event.preventDefault();
  document.activeElement.blur(); // from now on Ctrl Z is about the mask, not about what was typed
  $("overlay").setPointerCapture(event.pointerId);
  changeMask();
  image.painted = image.mask;
  image.cursor = onStage(event);
  paint(image.cursor, image.cursor);
  paintOverlay();
}

function follow(event) {
  if (image.pointer !== null && image.pointer !== event.pointerId) return;
  const at = onStage(event);
  const isPainting = image.painted === image.mask && $("overlay").hasPointerCapture(event.pointerId);
  if (isPainting) paint(image.cursor ?? at, at); // not if the stroke was undone, or another image given
  image.cursor = at;
  paintOverlay();
}

/** Undoes a stroke that was the beginning of a gesture: two fingers zoom. */
function cancelStroke({ pointerId }) {
  if (pointerId === image.pointer && image.painted === image.mask) undoMask();
}

let overlayDue = false;

function paintOverlay() {
  if (overlayDue) return;
  overlayDue = true;
  requestAnimationFrame(() => {
    overlayDue = false;
    const mask = image.left ? image.mask.map(() => 1) : image.mask;
    const accent = getComputedStyle(document.body).getPropertyValue("--mask");
    showMask($("overlay"), mask, accent, image.cursor && [...image.cursor, brushSize()]);
  });
}

/** Brings the card in line with the state. */
export function showImage() {
  for (const id of ["canvas", "overlay", "mask-tools", "image-leave", "replace", "remove"]) $(id).hidden = !image.given;
  $("drop").hidden = image.given;
  $("stage").classList.toggle("empty", !image.given);
  $("image-card").classList.toggle("left", image.left);
  $("image-leave").setAttribute("aria-pressed", image.left);
  $("undo").disabled = !image.undos.length;
  const preset = image.left ? undefined : presetOf(image.mask);
  for (const button of document.querySelectorAll("[data-preset]")) {
    button.setAttribute("aria-pressed", button.dataset.preset === preset);
  }
  if (image.given) paintOverlay();
}
