// The pose editor. SETUP and `element` are given; the text area #SETUP.field holds the pose, and nothing else does.
const svg = element.querySelector("svg"), said = element.querySelector(".said");
const [height, width] = SETUP.size, NS = "http://www.w3.org/2000/svg", undone = [];
const clone = (value) => JSON.parse(JSON.stringify(value));
const area = () => document.querySelector(`#${SETUP.field} textarea`);
let people = clone(SETUP.examples[0].keypoints), chosen = [0, 0], held = null, shown = "";

// A keypoint that is not visible may have any place, also none.
const read = (text) => {
  const pose = JSON.parse(text), [h, w] = pose.size || SETUP.size, n = SETUP.names.length;
  if (!Array.isArray(pose.keypoints) || pose.keypoints.some((p) => !Array.isArray(p) || p.length !== n)) throw Error();
  const move = (v, from, to) => (Number.isFinite(v) ? ((v + 0.5) * to) / from - 0.5 : to / 2);
  return pose.keypoints.map((p) => p.map(([x, y, v]) => [move(x, w, width), move(y, h, height), v > 0 ? 1 : 0]));
};
const round = (value) => Math.round(value * 10) / 10;
const written = () => JSON.stringify({ size: [height, width],
  keypoints: people.map((p) => p.map(([x, y, v]) => [round(x), round(y), v])) });
const save = () => {
  const field = area();
  if (!field) return;
  field.value = shown = written();
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const remember = () => { undone.push(clone(people)); if (undone.length > 100) undone.shift(); };
const add = (kind, attributes) => {
  const node = document.createElementNS(NS, kind);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  return svg.appendChild(node);
};
const color = (rgb, dim) => `rgb(${rgb.map((c) => Math.round(c * dim)).join(",")})`;

function draw() {
  svg.querySelectorAll("line, circle").forEach((node) => node.remove());
  const unit = Math.max(width, height) / 64;
  people.forEach((person, number) => {
    SETUP.limbs.forEach(([a, b], limb) => {
      const [from, to] = [person[a], person[b]];
      const seen = from[2] > 0 && to[2] > 0;
      const line = add("line", { x1: from[0] + 0.5, y1: from[1] + 0.5, x2: to[0] + 0.5, y2: to[1] + 0.5,
        stroke: seen ? color(SETUP.colors[limb], 0.6) : "#888", "stroke-width": (seen ? 1.4 : 0.4) * unit,
        "stroke-dasharray": seen ? "" : `${unit}`, "stroke-linecap": "round", "data-person": number });
      line.style.cursor = "move";
    });
  });
  people.forEach((person, number) => person.forEach(([x, y, visible], joint) => {
    const mark = chosen[0] === number && chosen[1] === joint;
    const dot = add("circle", { cx: x + 0.5, cy: y + 0.5, r: 1.25 * unit, "data-person": number, "data-joint": joint,
      fill: visible > 0 ? color(SETUP.colors[joint], 1) : "#222", "fill-opacity": visible > 0 ? 1 : 0.6,
      stroke: mark ? "#fff" : visible > 0 ? "#000" : "#aaa", "stroke-width": (mark ? 0.6 : 0.25) * unit });
    dot.style.cursor = "grab";
    dot.appendChild(document.createElementNS(NS, "title")).textContent = SETUP.names[joint];
  }));
  const point = people[chosen[0]] && people[chosen[0]][chosen[1]];
  said.textContent = !point ? "" : `person ${chosen[0] + 1}, ${SETUP.names[chosen[1]].replace("_", " ")}: ` +
    (point[2] > 0 ? `${round(point[0])}, ${round(point[1])}` : "hidden");
}
const place = (event) => {
  const box = svg.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width - 0.5, ((event.clientY - box.top) / box.height) * height - 0.5];
};
const inside = (value, limit) => Math.min(Math.max(value, -0.5), limit - 0.51);

svg.addEventListener("pointerdown", (event) => {
  const { person, joint } = event.target.dataset;
  if (person === undefined) return;
  event.preventDefault();
  svg.focus({ preventScroll: true });
  svg.setPointerCapture(event.pointerId);
  remember();
  held = { person: +person, joint: joint === undefined ? null : +joint, last: place(event) };
  chosen = [held.person, held.joint === null ? chosen[0] === held.person ? chosen[1] : 0 : held.joint];
  draw();
});
svg.addEventListener("pointermove", (event) => {
  if (!held) return;
  const [x, y] = place(event), person = people[held.person];
  if (held.joint !== null) person[held.joint] = [inside(x, width), inside(y, height), person[held.joint][2]];
  else person.forEach((point) => { point[0] += x - held.last[0]; point[1] += y - held.last[1]; });
  held.last = [x, y];
  draw();
});
const release = () => { if (held) { held = null; save(); } };
svg.addEventListener("pointerup", release);
svg.addEventListener("pointercancel", release);
svg.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const point = people[chosen[0]] && people[chosen[0]][chosen[1]];
  if (!step || !point) return;
  event.preventDefault();
  remember();
  point[0] = inside(point[0] + (step[0] * width) / 64, width);
  point[1] = inside(point[1] + (step[1] * height) / 64, height);
  draw(); save();
});

const change = (action) => () => { remember(); action(); draw(); save(); };
const actions = {
  hide: change(() => { const point = people[chosen[0]][chosen[1]]; point[2] = point[2] > 0 ? 0 : 1; }),
  // Left and right change places, as in an image that is mirrored.
  mirror: change(() => { people = people.map((p) => SETUP.mirror.map((k) => [width - 1 - p[k][0], p[k][1], p[k][2]])); }),
  add: change(() => {
    const shift = (people.length % 2 ? 1 : -1) * width * 0.2;
    people.push(clone(SETUP.examples[0].keypoints[0]).map(([x, y, v]) => [inside(x + shift, width), y, v]));
    chosen = [people.length - 1, 0];
  }),
  remove: change(() => { if (people.length > 1) { people.splice(chosen[0], 1); chosen = [0, 0]; } }),
  undo: () => { if (undone.length) { people = undone.pop(); chosen = [0, 0]; draw(); save(); } },
  save: () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([written() + "\n"], { type: "application/json" }));
    link.download = "pose.json";
    link.click();
  },
};
element.querySelectorAll("button[data-do]").forEach((button) => button.addEventListener("click", actions[button.dataset.do]));
element.querySelector("select").addEventListener("change", (event) => change(() => {
  people = clone(SETUP.examples[+event.target.value].keypoints); chosen = [0, 0];
})());
element.querySelector("input[type=file]").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  const field = area();  // also what is no pose: the run says what is wrong with it
  field.value = (await file.slice(0, SETUP.bytes + 1).text());
  field.dispatchEvent(new Event("input", { bubbles: true }));
});
const show = () => {
  const field = area();
  if (!field || field.value === shown || held) return;
  shown = field.value;
  try { people = read(shown); chosen = [0, 0]; draw(); said.classList.remove("wrong"); }
  catch { said.textContent = "this JSON is no pose"; said.classList.add("wrong"); }
};
document.addEventListener("input", (event) => { if (event.target === area()) show(); });
// The picture that came out lies behind the joints.
new MutationObserver(() => {
  const picture = document.querySelector(`#${SETUP.result} img[data-name=guided]`);
  const behind = svg.querySelector("image"), on = element.querySelector("input[type=checkbox]").checked;
  const source = picture && on ? picture.getAttribute("src") : "";
  if (behind.getAttribute("href") !== source) behind.setAttribute("href", source);
}).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["src"] });
element.querySelector("input[type=checkbox]").addEventListener("change", (event) => {
  const picture = document.querySelector(`#${SETUP.result} img[data-name=guided]`);
  svg.querySelector("image").setAttribute("href", event.target.checked && picture ? picture.getAttribute("src") : "");
});
const begin = () => (area() ? (draw(), save()) : setTimeout(begin, 50));
begin();
