// The playground: reads the controls, asks the server for tokens, and shows them as they come.

import { ServerError, call, key, stream } from "./api.js";
import { sample } from "./memory.js";
import { Alternatives, Answer } from "./tokens.js";

const TOP = 8; // alternatives that are asked for
const CONTEXT = 16; // ids before a token that settle its text
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const EXAMPLE = `import argparse


def read_lines(path):
    """Return the lines of a text file, without the empty ones."""
    with open(path, encoding="utf-8") as file:
`;

const $ = (id) => document.getElementById(id);
const post = async (path, body, signal) => (await call(path, { model: $("model").value, ...body }, signal)).json();

let models = [];
let chatting = false;
let running = null; // the AbortController of the run, and whether it is one of the chat
const notes = { completion: "", chat: "" }; // what the status says under each tab
let turns = []; // of the conversation: {user, answer, element}

const completion = new Answer($("completion"));
const alternatives = new Alternatives($("alternatives"), (...choice) => run((signal) => take(signal, ...choice)));
alternatives.watch(completion);

// --- runs -----------------------------------------------------------------------------------------------------------

// Do something that the stop button ends; a run before it ends first.
async function run(work) {
  running?.abort();
  const mine = Object.assign(new AbortController(), { chat: chatting });
  running = mine;
  alternatives.hide();
  $("error").textContent = "";
  $("stop").disabled = false;
  $("continue").disabled = true;
  note("Writing …", mine.chat);
  sample();
  const timer = setInterval(sample, 1000);
  try {
    await work(mine.signal);
  } catch (error) {
    if (running === mine) tell(error, mine.chat);
  } finally {
    clearInterval(timer);
    if (running === mine) {
      running = null;
      $("stop").disabled = true;
      $("continue").disabled = !latest()?.tokens.length;
      showNote();
      setTimeout(sample, 500); // when the server has counted its end
    }
  }
}

// Say something about the completion or the chat, under its tab.
function note(text, chat) {
  notes[chat ? "chat" : "completion"] = text;
  showNote();
}

function showNote() {
  const elsewhere = running !== null && running.chat !== chatting;
  $("status").textContent = elsewhere
    ? `Writing under ${running.chat ? "Chat" : "Completion"} …`
    : notes[chatting ? "chat" : "completion"];
}

function tell(error, chat = chatting) {
  if (error.name === "AbortError") {
    note("Stopped.", chat);
    return;
  }
  note("", chat);
  $("error").textContent = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

const latest = () => (chatting ? turns.at(-1)?.answer : completion);

function sampling() {
  const chosen = {};
  for (const name of NUMBERS) {
    const field = $(name);
    if (!field.checkValidity()) {
      $("settings").open = true;
      field.focus();
      throw new ServerError(`${field.labels[0].textContent.trim()}: ${field.validationMessage}`);
    }
    if (field.value !== "") chosen[name] = Number(field.value);
  }
  const stops = $("stop_strings").value.split("\n").filter(Boolean);
  if (stops.length) chosen.stop = stops.map((stop) => stop.replace(/\\n/g, "\n").replace(/\\t/g, "\t"));
  return chosen;
}

// Continue an answer from where it is.
async function write(signal, answer) {
  const prompt = [...answer.prompt, ...answer.ids];
  const body = {
    ...sampling(), model: $("model").value, prompt, logprobs: TOP, return_token_ids: true,
    stream: true, stream_options: { include_usage: true },
  };
  const began = performance.now();
  let [first, last, early, count, reason, waiting] = [0, 0, 0, 0, "", []]; // early: tokens of the first event
  for (const name of ["speed", "first", "cached", "read", "written"]) $(name).textContent = "–";
  $("asked").textContent = number(prompt.length);

  const { version } = answer;
  const view = answer.element.closest("#conversation") ?? answer.element; // what scrolls
  const draw = (ended) => {
    if (answer.version !== version) return; // another run has cut it
    const stuck = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
    answer.add(waiting, ended);
    waiting = [];
    if (stuck && !alternatives.open) view.scrollTop = view.scrollHeight;
    $("written").textContent = number(count);
    if (first) $("first").textContent = seconds(first - began);
    if (last > first) $("speed").textContent = ((1000 * (count - early)) / (last - first)).toFixed(1);
  };
  try {
    for await (const { choices, usage } of stream("v1/completions", body, signal)) {
      if (usage) {
        const { cached_tokens: cached } = usage.prompt_tokens_details;
        $("cached").textContent = number(cached);
        $("read").textContent = number(usage.prompt_tokens - cached);
      }
      if (!choices.length) continue;
      if (!waiting.length) requestAnimationFrame(() => draw(false));
      const tokens = tokensOf(choices[0]);
      waiting.push(...tokens);
      reason = choices[0].finish_reason;
      count += tokens.length;
      last = performance.now();
      if (!first) [first, early] = [last, tokens.length];
    }
  } finally {
    draw(true);
  }
  const why = reason === "stop" ? "it ended by itself or at a stop string" : "that is the most that was asked for";
  note(`${number(count)} tokens written: ${why}.`, answer !== completion);
}

// The tokens of an event, each with the text that it added.
function tokensOf({ logprobs, token_ids: ids, token_texts: texts }) {
  return ids.map((id, i) => {
    const named = logprobs.top_token_ids[i];
    const top = Object.entries(logprobs.top_logprobs[i]).map(([name, logprob]) => ({ id: named[name], name, logprob }));
    top.sort((a, b) => b.logprob - a.logprob);
    return { id, name: logprobs.tokens[i], text: texts[i], logprob: logprobs.token_logprobs[i], top };
  });
}

// Put an alternative in the place of a token, forget what followed, and continue from there.
async function take(signal, answer, place, { id, name, logprob }) {
  const { top } = answer.tokens[place];
  const { from } = answer.pieces.find(({ to }) => to > place);
  const ids = [...answer.prompt, ...answer.ids.slice(0, place)];
  const start = Math.max(0, answer.prompt.length + from - CONTEXT);
  const [before, after] = await Promise.all(
    [ids.slice(start, answer.prompt.length + from), [...ids.slice(start), id]].map(
      async (tokens) => (await post("detokenize", { tokens }, signal)).prompt,
    ),
  );
  const text = after.slice(before.length).replace(/\ufffd+$/, ""); // the server completes a begun character
  answer.cut(place);
  answer.add([{ id, name, text, logprob, top }]);
  const turn = turns.findIndex((turn) => turn.answer === answer);
  if (turn >= 0) forget(turn + 1);
  await write(signal, answer);
}

const number = (count) => count.toLocaleString("en");
const seconds = (time) => (time < 1000 ? `${time.toFixed(0)} ms` : `${(time / 1000).toFixed(2)} s`);

// --- completion and chat --------------------------------------------------------------------------------------------

async function complete(signal) {
  const { tokens } = await post("tokenize", { prompt: $("prompt").value }, signal);
  completion.clear();
  completion.prompt = tokens;
  await write(signal, completion);
}

async function say(signal) {
  const user = $("message").value;
  const system = $("system").value;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    messages.push({ role: "user", content: turn.user }, { role: "assistant", content: turn.answer.text });
  }
  messages.push({ role: "user", content: user });
  const { tokens } = await post("tokenize", { messages }, signal);
  const element = document.createElement("div");
  const question = document.createElement("p");
  const reply = document.createElement("div");
  question.className = "question";
  question.textContent = user;
  reply.className = "answer";
  element.append(question, reply);
  $("conversation").append(element);
  const answer = new Answer(reply);
  answer.prompt = tokens;
  alternatives.watch(answer);
  turns.push({ user, answer, element });
  $("message").value = "";
  $("conversation").scrollTop = $("conversation").scrollHeight;
  try {
    await write(signal, answer);
  } finally {
    if (!answer.tokens.length && turns.at(-1)?.answer === answer) { // no answer came: the message can be sent again
      forget(turns.length - 1);
      $("message").value ||= user;
    }
  }
}

// Forget the turns of the conversation from one on.
function forget(count) {
  for (const turn of turns.splice(count)) turn.element.remove();
}

function clear() {
  running?.abort();
  alternatives.hide();
  completion.clear();
  forget(0);
  $("continue").disabled = true;
  $("error").textContent = "";
  note("", false);
  note("", true);
}

function start() {
  if (chatting && !$("message").value) $("message").focus();
  else run(chatting ? say : complete);
}

// --- models, tabs, keys ---------------------------------------------------------------------------------------------

async function connect() {
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (error) {
    tell(error);
    return;
  }
  $("error").textContent = "";
  $("model").replaceChildren(...models.map(({ id }) => new Option(id)));
  choose();
  sample();
}

// Use the model that is chosen: its ids are not those of another.
function choose() {
  clear();
  const model = models.find(({ id }) => id === $("model").value);
  const able = model?.takes_chats ?? false;
  $("tab-chat").setAttribute("aria-disabled", String(!able));
  $("no-chat").textContent = able ? "" : `${model?.id} has no chat template, so it takes no conversations: start the `
    + "server with --chat-template.";
  $("tab-chat").title = $("no-chat").textContent;
  show(chatting && able);
}

function show(chat) {
  chatting = chat;
  alternatives.hide();
  for (const [name, on] of [["completion", !chat], ["chat", chat]]) {
    $(`tab-${name}`).setAttribute("aria-selected", String(on));
    $(`tab-${name}`).tabIndex = on ? 0 : -1;
    $(`panel-${name}`).hidden = !on;
  }
  $("no-chat").hidden = true;
  showNote();
  $("continue").disabled = running !== null || !latest()?.tokens.length;
}

function pick(tab) {
  const chat = tab === $("tab-chat");
  if (chat && tab.getAttribute("aria-disabled") === "true") $("no-chat").hidden = false;
  else show(chat);
  tab.focus();
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => pick(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") pick(tab.nextElementSibling ?? tab.previousElementSibling);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  } else if (event.key === "Escape") {
    if (!alternatives.open) return void running?.abort();
    if (alternatives.element.contains(document.activeElement)) alternatives.span.focus({ preventScroll: true });
    alternatives.hide();
  }
});

$("run").addEventListener("click", start);
$("stop").addEventListener("click", () => running?.abort());
$("continue").addEventListener("click", () => run((signal) => write(signal, latest())));
$("clear").addEventListener("click", clear);
$("model").addEventListener("change", choose);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  connect();
});

$("prompt").value ||= EXAMPLE; // a browser that loads the page again has filled the fields
$("settings").open = matchMedia("(min-width: 800px)").matches;
connect();
