// The memory that the server holds, from /metrics, drawn over the last two minutes.

import { call } from "./api.js";

const SERIES = [
  ["kv", "hyaena:kv_cache_bytes"],
  ["states", "hyaena:state_bytes"],
  ["snapshots", "hyaena:prefix_cache_state_bytes"],
];
const SAMPLES = 120;
const history = [];

export function bytes(count) {
  if (count < 1e3) return `${count} B`;
  const power = Math.min(3, Math.floor(Math.log10(count) / 3));
  return `${(count / 1000 ** power).toPrecision(3)} ${["B", "kB", "MB", "GB"][power]}`;
}

// Ask once, and draw. A server that does not answer is told by the request that runs, not here.
export async function sample() {
  let text;
  try {
    text = await (await call("metrics")).text();
  } catch {
    return;
  }
  const sums = new Map(); // several servers may answer as one
  for (const [, name, value] of text.matchAll(/^([\w:]+)\{.*\} (\S+)$/gm)) {
    sums.set(name, (sums.get(name) ?? 0) + Number(value));
  }
  history.push(SERIES.map(([, name]) => sums.get(name) ?? 0));
  if (history.length > SAMPLES) history.shift();
  draw();
}

// Areas on top of each other; the newest sample is at the right.
function draw() {
  const picture = document.getElementById("memory");
  const most = Math.max(1, ...history.map((row) => row[0] + row[1] + row[2]));
  const x = (index) => 300 - (history.length - 1 - index) * (300 / (SAMPLES - 1));
  const y = (value) => 90 - 86 * (value / most);
  const sums = history.map(() => 0);
  picture.replaceChildren();
  SERIES.forEach(([name], series) => {
    const below = history.map((_, index) => `${x(index)},${y(sums[index])}`).reverse();
    history.forEach((row, index) => { sums[index] += row[series]; });
    const above = history.map((_, index) => `${x(index)},${y(sums[index])}`);
    const area = document.createElementNS("http://www.w3.org/2000/svg", "polygon");
    area.setAttribute("points", [...above, ...below].join(" "));
    area.setAttribute("class", name);
    picture.append(area);
    document.getElementById(name).textContent = bytes(history.at(-1)[series]);
  });
}
