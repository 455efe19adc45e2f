// The arrows of a drag. SETUP and `element` are given; the text area #SETUP.field holds the rows, and nothing else does.
const svg = element.querySelector("svg"), said = element.querySelector(".said");
const [height, width] = SETUP.size, NS = "http://www.w3.org/2000/svg";
const area = () => document.querySelector(`#${SETUP.field} textarea`);
let rows = [], from = null, shown = null;
const round = (value) => Math.round(value * 10) / 10;
const inside = (value, limit) => Math.min(Math.max(value, -0.5), limit - 0.51);
const save = () => {
  area().value = shown = JSON.stringify(rows);
  area().dispatchEvent(new Event("input", { bubbles: true }));
};
const add = (kind, attributes) => {
  const node = document.createElementNS(NS, kind);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  svg.appendChild(node);
};
function draw() {
  svg.querySelectorAll("line, circle").forEach((node) => node.remove());
  const unit = Math.max(width, height) / 64, all = from && from.to ? [...rows, [...from.at, ...from.to]] : rows;
  if (from) add("circle", { cx: from.at[0] + 0.5, cy: from.at[1] + 0.5, r: unit, fill: "#e11" });
  all.forEach((row) => {
    const [x1, y1, x2, y2] = row.map((value) => value + 0.5);
    ["#000", "#fff"].forEach((stroke, layer) =>
      add("line", { x1, y1, x2, y2, stroke, "stroke-width": (layer ? 0.5 : 1) * unit, "stroke-linecap": "round" }));
    add("circle", { cx: x1, cy: y1, r: unit, fill: "#e11", stroke: "#fff", "stroke-width": 0.25 * unit });
    add("circle", { cx: x2, cy: y2, r: 1.3 * unit, fill: "#16a", stroke: "#fff", "stroke-width": 0.25 * unit });
  });
  said.textContent = from ? "now where it is to go" : rows.length ? `${rows.length} drawn, from red to blue`
    : "press on what is to move, then on where it is to go, or pull it there";
}
const place = (event) => {
  const box = svg.getBoundingClientRect();
  return [inside(((event.clientX - box.left) / box.width) * width - 0.5, width),
    inside(((event.clientY - box.top) / box.height) * height - 0.5, height)].map(round);
};
const far = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]) > width / 64;
const finish = (to) => { rows.push([...from.at, ...to]); from = null; draw(); save(); };
svg.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  const at = place(event);
  svg.setPointerCapture(event.pointerId);
  if (from) from.to = at;
  else from = { at };
  draw();
});
svg.addEventListener("pointermove", (event) => {
  if (!from || !event.buttons) return;
  const at = place(event);
  if (from.to || far(from.at, at)) { from.to = at; draw(); }
});
svg.addEventListener("pointerup", (event) => { if (from && from.to) finish(place(event)); });
element.querySelector("[data-do=undo]").addEventListener("click", () => { if (from) from = null; else rows.pop(); draw(); save(); });
element.querySelector("[data-do=clear]").addEventListener("click", () => { rows = []; from = null; draw(); save(); });
const show = () => {
  if (area().value === shown) return;
  shown = area().value;
  try {
    const given = JSON.parse(shown || "[]");
    if (!Array.isArray(given) || given.some((row) => !Array.isArray(row) || row.length !== 4 || !row.every(Number.isFinite)))
      throw Error();
    rows = given; from = null; draw(); said.classList.remove("wrong");
  } catch { said.textContent = "these are no rows of four numbers"; said.classList.add("wrong"); }
};
document.addEventListener("input", (event) => { if (event.target === area()) show(); });
new MutationObserver(() => {
  const picture = document.querySelector(`#${SETUP.result} img`), behind = svg.querySelector("image");
  const source = picture && picture.getAttribute("src") ? picture.getAttribute("src") : "";
  if (behind.getAttribute("href") === source) return;
  behind.setAttribute("href", source);  // another picture: the arrows belonged to the one before
  if (rows.length || from) { rows = []; from = null; draw(); save(); }
}).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["src"] });
draw();
