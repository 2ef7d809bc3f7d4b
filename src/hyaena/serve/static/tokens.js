// One answer of the model: pieces of text, each with the tokens that made it, coloured by their probability.

const BOUNDS = [0.9, 0.5, 0.2, 0.05];
const BLOCK = 200; // pieces after which a line ends a block, so that the browser lays out a long answer in parts

export const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};

// What a token is called where it stands alone: white space can be seen.
export const shown = (name) => name.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");

export class Answer {
  // `prompt`: the ids that the answer follows.
  constructor(element) {
    this.element = element;
    this.prompt = [];
    this.version = 0; // counts what is not an addition
    this.clear();
  }

  clear() {
    this.version += 1;
    this.tokens = []; // {id, name, text, logprob, top: [{id, name, logprob}]}
    this.pieces = []; // {from, to, span}: tokens from .. to - 1 made the text of the span
    this.element.replaceChildren();
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  // Add tokens and draw them together. A token that completes no character is drawn with the next one that does.
  add(tokens, ended = false) {
    if (tokens.length && this.pieces.at(-1)?.span.classList.contains("unseen")) this.#drop();
    let from = this.pieces.at(-1)?.to ?? 0;
    for (const token of tokens) {
      this.tokens.push(token);
      if (token.text) {
        this.#piece(from, this.tokens.length, token.text, "token");
        from = this.tokens.length;
      }
    }
    if (ended && from < this.tokens.length) {
      const names = this.tokens.slice(from).map((token) => shown(token.name));
      this.#piece(from, this.tokens.length, names.join(""), "token unseen");
    }
  }

  // Forget the tokens from one on.
  cut(count) {
    this.version += 1;
    while (this.pieces.length && this.pieces.at(-1).to > count) this.#drop();
    this.tokens.length = count;
  }

  pieceOf(span) {
    return this.pieces[span.dataset.piece];
  }

  #drop() {
    const { span } = this.pieces.pop();
    const block = span.parentElement;
    span.remove();
    if (!block.childElementCount) block.remove();
  }

  #piece(from, to, text, kind) {
    const span = document.createElement("span");
    const least = Math.min(...this.tokens.slice(from, to).map((token) => token.logprob));
    const level = BOUNDS.findIndex((bound) => Math.exp(least) >= bound);
    span.className = `${kind} p${level < 0 ? BOUNDS.length : level}${text.includes("\n") ? " newline" : ""}`;
    span.textContent = text;
    span.dataset.piece = this.pieces.length;
    span.tabIndex = this.pieces.length ? -1 : 0;
    const last = this.pieces.at(-1)?.span;
    if (!last || (this.element.lastChild.childElementCount >= BLOCK && last.textContent.endsWith("\n"))) {
      this.element.append(document.createElement("div"));
    }
    this.element.lastChild.append(span);
    this.pieces.push({ from, to, span });
  }
}

// The panel with the alternatives of the token under the pointer, the focus or the finger.
export class Alternatives {
  // `choose(answer, place, alternative)` is called with what the user takes.
  constructor(element, choose) {
    this.element = element;
    this.choose = choose;
    this.span = null;
    element.addEventListener("keydown", (event) => this.#move(event));
    document.addEventListener("pointerdown", (event) => {
      if (!element.contains(event.target) && !event.target.closest(".token")) this.hide();
    });
    document.addEventListener("scroll", ({ target }) => this.#follow(target), { capture: true, passive: true });
    document.addEventListener("pointerover", ({ target, pointerType }) => {
      const away = !element.contains(target) && !target.closest(".answer");
      if (pointerType === "mouse" && away && document.activeElement !== this.span) this.hide();
    });
  }

  get open() {
    return this.span !== null;
  }

  watch(answer) {
    const { element } = answer;
    const show = (event) => event.target.classList.contains("token") && this.show(answer, event.target);
    // Not "pointerover": a token that comes to lie under a pointer that rests, or under a finger that scrolls, is not meant.
    element.addEventListener("pointermove", (event) => event.pointerType === "mouse" && show(event));
    element.addEventListener("click", show);
    element.addEventListener("focusin", show);
    element.addEventListener("keydown", (event) => this.#walk(event, answer));
  }

  show(answer, span) {
    if (span === this.span) return;
    this.hide();
    this.span = span;
    span.classList.add("current");
    const { from, to } = answer.pieceOf(span);
    for (let place = from; place < to; place++) this.element.append(this.#list(answer, place));
    this.element.hidden = false;
    const { bottom } = this.#place();
    if (getComputedStyle(this.element).position === "fixed") { // at the bottom of a phone: not over the token
      window.scrollBy(0, Math.max(0, bottom + 8 - this.element.getBoundingClientRect().top));
    }
  }

  // Put the panel beside its token; where that is on the screen.
  #place() {
    const box = this.span.getClientRects()[0] ?? this.span.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left, width - this.element.offsetWidth - 8));
    const below = box.bottom + this.element.offsetHeight < window.innerHeight;
    const top = below ? box.bottom : Math.max(0, box.top - this.element.offsetHeight);
    this.element.style.left = `${left + window.scrollX}px`;
    this.element.style.top = `${top + window.scrollY}px`;
    return box;
  }

  // Stay with the token while its answer is scrolled, as long as it can be seen.
  #follow(target) {
    if (!this.open || !target.contains(this.span)) return;
    const box = this.#place();
    const view = (target === document ? document.documentElement : target).getBoundingClientRect();
    if (box.bottom < view.top || box.top > view.bottom) this.hide();
  }

  hide() {
    this.span?.classList.remove("current");
    this.span = null;
    this.element.hidden = true;
    this.element.replaceChildren();
  }

  #list(answer, place) {
    const token = answer.tokens[place];
    const list = document.createElement("ul");
    for (const one of token.top) {
      const item = document.createElement("li");
      const button = document.createElement("button");
      const name = document.createElement("code");
      const bar = document.createElement("i");
      name.textContent = shown(one.name) || "(empty)";
      bar.style.width = `${100 * Math.exp(one.logprob)}%`;
      button.append(name, bar, percent(one.logprob));
      if (one.id === token.id) {
        button.setAttribute("aria-current", "true");
        button.title = "The token that was written; write again from here on";
      } else {
        button.title = "Continue with this token instead";
      }
      button.addEventListener("click", () => this.choose(answer, place, one));
      item.append(button);
      list.append(item);
    }
    return list;
  }

  // Arrows go from token to token, Enter into the panel.
  #walk(event, answer) {
    const { pieces } = answer;
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.ctrlKey || event.metaKey || event.altKey || !pieces.length) return;
    if (event.key in steps) {
      const at = event.target.classList.contains("token") ? Number(event.target.dataset.piece) : -1;
      const next = pieces[Math.max(0, Math.min(pieces.length - 1, at + steps[event.key]))].span;
      pieces[Math.max(0, at)].span.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    } else if (event.key === "Enter" && event.target === this.span) {
      this.element.querySelector("button").focus();
    } else {
      return;
    }
    event.preventDefault();
  }

  #move(event) {
    const buttons = [...this.element.querySelectorAll("button")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length).focus();
    event.preventDefault();
  }
}
