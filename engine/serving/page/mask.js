// Masks of square images: Uint8Array of 0 and 1, row by row, 1 where the image is generated.

const SIDE = 768; // pixels of the canvas on which a mask is shown
const canvas = document.createElement("canvas");

/** By name, whether a mask of so many pixels a side is 1 at a place. */
export const PRESETS = {
  "left half": (size, x) => x < size / 2,
  "right half": (size, x) => x >= size / 2,
  "top half": (size, x, y) => y < size / 2,
  "bottom half": (size, x, y) => y >= size / 2,
  centre: (size, x, y) => [x, y].every((z) => z >= size / 4 && z < (size * 3) / 4),
};

const sizeOf = (mask) => Math.sqrt(mask.length);
export const emptyMask = (size) => new Uint8Array(size ** 2);
export const presetMask = (name, size) => emptyMask(size).map((_, i) => PRESETS[name](size, i % size, Math.floor(i / size)));
export const shareOf = (mask) => mask.reduce((sum, on) => sum + on, 0) / mask.length;

/** The name of the preset that a mask equals, or undefined. */
export const presetOf = (mask) =>
  Object.keys(PRESETS).find((name) => presetMask(name, sizeOf(mask)).every((on, i) => on === mask[i]));

/** Sets a line from one place to another to `value`, `width` pixels wide, one at least. */
export function drawLine(mask, [x0, y0], [x1, y1], width, value) {
  const size = sizeOf(mask);
  const length = (x1 - x0) ** 2 + (y1 - y0) ** 2;
  mask.forEach((_, i) => {
    const [x, y] = [(i % size) + 0.5, Math.floor(i / size) + 0.5];
    const along = length && Math.min(1, Math.max(0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length));
    const [dx, dy] = [x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)];
    if (Math.hypot(dx, dy) <= radiusOf(width)) mask[i] = value;
  });
}

const radiusOf = (width) => Math.max(width / 2, 0.71); // a smaller circle may hold no pixel's centre

/** Shows a mask as a tint, a hatching and an outline, through which the image stays visible; `cursor` [x, y, width]. */
export function showMask(shown, mask, accent, cursor) {
  shown.width = shown.height = SIDE; // this also clears it
  const context = shown.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(drawn(mask, [0, 0, 0, 0]), 0, 0, SIDE, SIDE);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = hatching(context, accent);
  context.fillRect(0, 0, SIDE, SIDE);
  context.globalCompositeOperation = "source-over";
  const pixel = sizeOf(mask) / SIDE;
  context.scale(1 / pixel, 1 / pixel);
  context.lineCap = "square";
  const outlines = edgesOf(mask);
  if (cursor) {
    const [x, y, width] = cursor;
    const ring = new Path2D();
    ring.arc(x, y, radiusOf(width), 0, 2 * Math.PI);
    outlines.addPath(ring);
  }
  for (const [colour, width] of [["white", 6], [accent, 3]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: width * pixel });
    context.stroke(outlines);
  }
}

/** A mask as the service takes it: a PNG, white where it is 1, else black. */
export const maskURL = (mask) => drawn(mask, [0, 0, 0, 255]).toDataURL("image/png");

function drawn(mask, off) {
  const size = (canvas.width = canvas.height = sizeOf(mask));
  const data = new ImageData(size, size);
  mask.forEach((value, i) => data.data.set(value ? [255, 255, 255, 255] : off, 4 * i));
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
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
  const size = sizeOf(mask);
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
