// The canvas on which a sketch is drawn, black on white.

const SIDE = 512; // pixels; the service resizes it
const PEN = 1.6 / 64; // of the side: the width of the lines that models are trained on

function line(context, points) {
  Object.assign(context, { lineWidth: PEN * SIDE, lineCap: "round", lineJoin: "round", strokeStyle: "black" });
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points) context.lineTo(...point);
  context.stroke();
  context.beginPath(); // a click is a dot: lines of length 0 are not drawn
  context.arc(...points[0], context.lineWidth / 2, 0, 2 * Math.PI);
  context.fillStyle = "black";
  context.fill();
}

/** Makes a canvas one to draw on; `onChange` is called after each change. */
export function sketchPad(canvas, onChange) {
  const context = canvas.getContext("2d");
  let items = []; // lines, as lists of points, and images, in the order in which they were given
  let drawn = null; // the line that is being drawn, or was last
  let pointer = null; // that draws it
  const past = [];

  const at = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [((clientX - left) / width) * SIDE, ((clientY - top) / height) * SIDE];
  };
  const paint = () => {
    context.fillStyle = "white";
    context.fillRect(0, 0, SIDE, SIDE);
    for (const item of items) Array.isArray(item) ? line(context, item) : context.drawImage(item, 0, 0, SIDE, SIDE);
  };
  const show = (changed) => {
    items = changed;
    paint();
    onChange();
  };
  const change = (changed) => {
    past.push(items);
    show(changed);
  };

  const undo = () => past.length && show(past.pop());

  canvas.width = canvas.height = SIDE;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || !event.isPrimary || pointer !== null) return; // a hand may lie beside a pen
    pointer = event.pointerId;
    event.preventDefault();
    document.activeElement.blur(); // from now on Ctrl Z is about the sketch, not about what was typed
    canvas.setPointerCapture(event.pointerId);
    drawn = [at(event)];
    change([...items, drawn]);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (items.at(-1) !== drawn || pointer !== event.pointerId) return; // the line may be undone
    const moves = event.getCoalescedEvents?.() ?? [];
    drawn.push(...(moves.length ? moves : [event]).map(at));
    paint();
  });
  canvas.addEventListener("pointercancel", ({ pointerId }) => {
    if (pointerId === pointer && items.at(-1) === drawn) undo(); // it began a gesture: two fingers zoom
  });
  canvas.addEventListener("lostpointercapture", () => (pointer = null));
  paint();
  return {
    isGiven: () => items.length > 0,
    canUndo: () => past.length > 0,
    undo,
    clear: () => items.length && change([]),
    give: (bitmap) => change([bitmap]),
    data: () => canvas.toDataURL("image/png"),
  };
}
