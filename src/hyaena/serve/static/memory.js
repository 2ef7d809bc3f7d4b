// The memory that the server holds, from /metrics: while something is written, drawn over the last two minutes.

import { call } from "./api.js";

const SERIES = [
  ["kv", "hyaena:kv_cache_bytes"],
  ["states", "hyaena:state_bytes"],
  ["snapshots", "hyaena:prefix_cache_state_bytes"],
];
const SPAN = 120e3; // milliseconds
let history = []; // {time, values}

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
  const time = performance.now();
  history = history.filter((one) => time - one.time < SPAN);
  history.push({ time, values: SERIES.map(([, name]) => sums.get(name) ?? 0) });
  draw(time);
}

// Areas on top of each other; the newest sample is at the right.
function draw(now) {
  const picture = document.getElementById("memory");
  const most = Math.max(1, ...history.map(({ values }) => values[0] + values[1] + values[2]));
  const x = (index) => 300 - (300 * (now - history[index].time)) / SPAN;
  const y = (value) => 90 - 86 * (value / most);
  const sums = history.map(() => 0);
  picture.replaceChildren();
  SERIES.forEach(([name], series) => {
    const below = history.map((_, index) => `${x(index)},${y(sums[index])}`).reverse();
    history.forEach(({ values }, index) => { sums[index] += values[series]; });
    const above = history.map((_, index) => `${x(index)},${y(sums[index])}`);
    const area = document.createElementNS("http://www.w3.org/2000/svg", "polygon");
    area.setAttribute("points", [...above, ...below].join(" "));
    area.setAttribute("class", name);
    picture.append(area);
    document.getElementById(name).textContent = bytes(history.at(-1).values[series]);
  });
  document.getElementById("scale").textContent = `two minutes, up to ${bytes(most)}`;
}
