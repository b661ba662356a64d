// Makes the page from the data in it. Texts come from result files that nobody has vetted: they become text nodes, never markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = (number) => data.texts[number];
  const byId = (id) => document.getElementById(id);

  /** A record by its number, as packed.py stored it: a pattern, in which the record's own values have their places. */
  function unpacked({ patterns, each }) {
    const filled = (part, own) => {
      if (Array.isArray(part)) return part.map((one) => filled(one, own));
      if (part !== null && typeof part === "object") return Object.fromEntries(Object.entries(part).map(([name, one]) => [name, filled(one, own)]));
      return part === "" ? own.next().value : part;
    };
    return (number) => filled(patterns[each[number][0]], each[number].slice(1).values());
  }

  /** An element with properties and children; strings among the children are text nodes. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") element.className = value;
      else if (name.includes("-")) element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function drawn(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** A small table that cannot be sorted. */
  function table(made, name = "") {
    const kind = (index) => (made.words?.includes(index) ? "words" : index < made.left ? "left" : "");
    const head = make("tr", {}, ...made.head.map((number, index) => make("th", { scope: "col", class: kind(index) }, text(number))));
    const rows = made.rows.map((row) => make("tr", {}, ...row.map((number, index) => make("td", { class: kind(index) }, text(number)))));
    const more = made.more === undefined ? null : make("p", { class: "about" }, text(made.more));
    return make("div", { class: "scroll" }, make("table", { class: name }, make("thead", {}, head), make("tbody", {}, ...rows)), more);
  }

  function facts(numbers) {
    const items = [];
    for (let index = 0; index < numbers.length; index += 2) {
      items.push(make("dt", {}, text(numbers[index])), make("dd", {}, text(numbers[index + 1])));
    }
    return make("dl", { class: "facts" }, ...items);
  }

  const lines = (numbers) => make("ul", { class: "lines" }, ...numbers.map((number) => make("li", {}, text(number))));
  const folded = (name, ...content) => make("details", {}, make("summary", {}, name), ...content);

  /** Stacked bars, one for each row, on one scale; a colour for each part. */
  function bars({ names, rows }) {
    const colour = (index) => `var(--p${index % 7})`;
    const sum = (parts) => parts.reduce((total, part) => total + part, 0);
    const longest = Math.max(...rows.map(([, parts]) => sum(parts)), Number.MIN_VALUE);
    const shown = rows.map(([label, parts]) => {
      const said = parts.map((part, index) => `${text(names[index])}: ${Math.round((100 * part) / (sum(parts) || 1))}%`);
      const segments = parts.map((part, index) => {
        const segment = make("i", { title: said[index] });
        segment.style.width = `${(100 * part) / longest}%`;
        segment.style.background = colour(index);
        return segment;
      });
      const name = `${text(label)}: ${said.join(", ")}`;
      return make("div", { class: "bar", role: "img", "aria-label": name }, make("span", {}, text(label)), make("div", {}, ...segments));
    });
    const legend = names.map((name, index) => {
      const swatch = make("i");
      swatch.style.background = colour(index);
      return make("li", {}, swatch, text(name));
    });
    return make("div", {}, ...shown, make("ul", { class: "legend" }, ...legend));
  }

  /** Samples as dots, a line of them for each round; the median of all and its interval across. */
  function strip(made) {
    const all = made.rounds.flat();
    const low = Math.min(...all, made.median);
    const range = Math.max(...all, made.median) - low || 1;
    const width = 600, left = 60, right = 20, row = 16, height = made.rounds.length * row + 26;
    const x = (value) => left + ((width - left - right) * (value - low)) / range;
    const bottom = made.rounds.length * row + 4;
    const parts = [drawn("line", { class: "axis", x1: left, x2: width - right, y1: bottom, y2: bottom })];
    if (made.ci) parts.push(drawn("rect", { class: "interval", x: x(made.ci[0]), y: 2, width: Math.max(1, x(made.ci[1]) - x(made.ci[0])), height: bottom - 2 }));
    parts.push(drawn("line", { class: "middle", x1: x(made.median), x2: x(made.median), y1: 2, y2: bottom }));
    made.rounds.forEach((samples, index) => {
      const y = index * row + row / 2 + 2;
      parts.push(drawn("text", { x: left - 10, y: y + 4, "text-anchor": "end" }, `round ${index + 1}`));
      for (const value of samples) parts.push(drawn("circle", { class: "dot", cx: x(value), cy: y, r: 3.5 }));
    });
    parts.push(drawn("text", { x: left, y: bottom + 15 }, text(made.ends[0])));
    parts.push(drawn("text", { x: width - right, y: bottom + 15, "text-anchor": "end" }, text(made.ends[1])));
    const said = `${text(made.about)}, from ${text(made.ends[0])} to ${text(made.ends[1])}`;
    const picture = drawn("svg", { class: "strip", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said }, ...parts);
    return make("div", {}, picture, make("p", { class: "about" }, text(made.about)));
  }

  /** The dialog beside the table, and which cells it goes through. */
  const drawer = (() => {
    const dialog = byId("drawer");
    const record = unpacked(data.drawers);
    let order = [], place = 0;

    function section(made) {
      const parts = [make("h3", {}, text(made.title))];
      if (made.lines?.length) parts.push(lines(made.lines));
      if (made.facts) parts.push(facts(made.facts));
      if (made.bars) parts.push(bars(made.bars));
      if (made.strip) parts.push(strip(made.strip));
      if (made.table) parts.push(table(made.table));
      if (made.log) parts.push(make("p", { class: "about" }, text(made.about)), make("pre", {}, made.log.map(text).join("\n")));
      return make("section", {}, ...parts);
    }

    function show() {
      const made = record(order[place]);
      const file = made.file === undefined ? "" : ` (${text(made.file)})`;
      byId("drawer-title").replaceChildren(text(made.title) + file + " ", badge(text(made.status)));
      byId("drawer-body").replaceChildren(...made.sections.map(section));
      byId("drawer-body").scrollTop = 0;
      byId("previous").disabled = place === 0;
      byId("next").disabled = place === order.length - 1;
    }

    function step(by) {
      if (order[place + by] === undefined) return;
      place += by;
      show();
    }

    byId("close").addEventListener("click", () => dialog.close());
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    return (cells, chosen) => {
      order = cells;
      place = cells.indexOf(chosen);
      show();
      dialog.showModal();
    };
  })();

  const FAILED = ["oom", "timeout", "crash", "wrong", "interrupted"];
  const badge = (said) => make("span", { class: "badge", "data-is": said }, said);
  const collator = new Intl.Collator("en", { numeric: true });

  const BATCH = 100; // rows that are laid out at once: a thousand would keep the reader waiting

  /** A table that can be sorted, filtered by words and chosen from; rows open the drawer. Rows are laid out as they come into view. */
  function searchable(made, about) {
    const body = make("tbody");
    const count = make("output", { "aria-live": "polite" });
    const none = make("p", { class: "none", hidden: true }, "No row has all of this.");
    const more = make("button", { type: "button", class: "more" });
    const opener = Math.max(0, made.columns.findIndex((column) => ["layout", "cell"].includes(text(column.name))));
    const record = unpacked(made.rows);
    const rows = made.rows.each.map((_, index) => {
      const [opens, texts, values] = record(index);
      return { opens, texts, values, index, words: texts.map(text).join(" ").toLowerCase() };
    });
    const input = make("input", { type: "search", placeholder: "ring 128k", autocomplete: "off", spellcheck: false });
    const selects = made.columns.map((column, index) => (column.choose ? choice(index) : null));
    let shown = rows;

    function cell(row, number, index) {
      const { kind, name } = made.columns[index];
      const said = text(number);
      const button = index === opener && row.opens !== null ? make("button", { type: "button", class: "open" }, said) : null;
      const type = kind === "number" ? "" : text(name) === "notes" ? "note" : "left";
      return make("td", { class: type }, kind === "badge" ? badge(said) : (button ?? said));
    }

    function element(row) {
      if (row.element) return row.element;
      const isFailed = made.columns.some((column, index) => column.kind === "badge" && FAILED.includes(text(row.texts[index])));
      row.element = make("tr", { class: `${isFailed ? "failed" : ""}${row.opens === null ? "" : " opens"}` }, ...row.texts.map((number, index) => cell(row, number, index)));
      if (row.opens !== null) row.element.addEventListener("click", () => drawer(shown.filter((one) => one.opens !== null).map((one) => one.opens), row.opens));
      return row.element;
    }

    /** A list of what a column says, in its order, where it says more than one thing. */
    function choice(index) {
      const found = [...new Map([...rows].sort(by(index, 1)).map((row) => [row.texts[index], text(row.texts[index])]))];
      if (found.length < 2) return null;
      const options = found.map(([number, said]) => make("option", { value: String(number) }, said));
      const select = make("select", {}, make("option", { value: "" }, "all"), ...options);
      select.addEventListener("change", filter);
      return select;
    }

    function by(index, sign) {
      const isText = rows.every((row) => row.values[index] === null);
      return (one, other) => {
        const [a, b] = [one.values[index], other.values[index]];
        if (isText) return sign * collator.compare(text(one.texts[index]), text(other.texts[index])) || one.index - other.index;
        if (a === null || b === null) return (a === null) - (b === null) || one.index - other.index;
        return sign * (a - b) || one.index - other.index;
      };
    }

    /** Lay out rows until there are so many. */
    function fill(wanted) {
      const done = body.children.length;
      body.append(...shown.slice(done, wanted).map(element));
      const rest = shown.length - body.children.length;
      more.hidden = rest <= 0;
      more.textContent = `Show ${rest} more rows`;
    }

    function filter() {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = selects.map((select) => select?.value ?? "");
      const fits = (row) => chosen.every((value, index) => value === "" || String(row.texts[index]) === value);
      shown = rows.filter((row) => fits(row) && words.every((word) => row.words.includes(word)));
      count.textContent = shown.length === rows.length ? `${rows.length} rows` : `${shown.length} of ${rows.length} rows`;
      none.hidden = shown.length > 0;
      body.replaceChildren();
      scroll.scrollTop = 0;
      fill(BATCH);
    }

    function sort(index, head) {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      rows.sort(by(index, descending ? -1 : 1));
      filter();
    }

    const heads = made.columns.map((column, index) => {
      const button = make("button", { type: "button" }, text(column.name));
      const head = make("th", { scope: "col", class: column.kind === "number" ? "" : "left" }, button);
      button.addEventListener("click", () => sort(index, head));
      return head;
    });
    body.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const target = shown[shown.findIndex((row) => row.element === event.target.closest("tr")) + step];
      if (!target) return;
      event.preventDefault();
      if (!element(target).isConnected) fill(body.children.length + BATCH);
      target.element.querySelector("button")?.focus();
    });
    input.addEventListener("input", filter);
    more.addEventListener("click", () => fill(body.children.length + BATCH));
    addEventListener("beforeprint", () => fill(Infinity));
    const chosen = selects.map((select, index) => select && make("label", {}, text(made.columns[index].name), select));
    const controls = make("div", { class: "controls", role: "search" }, make("label", {}, "Rows with the words", input), ...chosen, count);
    const head = make("thead", {}, make("tr", {}, ...heads));
    const scroll = make("div", { class: "tall", role: "region", "aria-label": about, tabIndex: 0 }, make("table", {}, head, body), more);
    new IntersectionObserver(([entry]) => entry.isIntersecting && !more.hidden && fill(body.children.length + BATCH), { root: scroll }).observe(more);
    filter();
    return make("div", { class: "card" }, controls, scroll, none);
  }

  function themed() {
    const button = byId("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
    const label = () => {
      button.textContent = isDark() ? "Light" : "Dark";
      button.setAttribute("aria-pressed", String(isDark()));
    };
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      label();
    });
    system.addEventListener("change", label);
    label();
  }

  function best() {
    const several = data.best.length > 1;
    for (const { name, tables } of data.best) {
      for (const made of tables) {
        byId("best").append(make("div", { class: "card" }, make("h3", {}, (several ? `${text(name)}: ` : "") + text(made.title)), table(made, "best"), made.about === undefined ? null : make("p", { class: "about" }, text(made.about))));
      }
    }
    byId("best").hidden = data.best.every(({ tables }) => tables.length === 0);
  }

  function changes() {
    const made = data.changes;
    if (!made) return;
    const parts = [make("p", {}, text(made.summary))];
    parts.push(made.environment.rows.length ? table(made.environment) : make("p", { class: "about" }, "Both were measured in the same environment."));
    byId("changes").append(make("div", { class: "card" }, ...parts), searchable(made.rows, "What changed"));
    if (made.notes.length) byId("changes").append(lines(made.notes));
    byId("changes").hidden = false;
  }

  function runs() {
    for (const made of data.runs) {
      const parts = [make("h3", {}, text(made.name)), facts(made.facts)];
      if (made.defaults.length) parts.push(folded("What the defaults chose", lines(made.defaults)));
      parts.push(folded("Machine and software", table(made.environment)));
      if (made.scenario.length) parts.push(folded("The scenario, every default filled in", make("pre", {}, made.scenario.map(text).join("\n"))));
      byId("runs").append(make("div", { class: "card" }, ...parts));
    }
  }

  byId("title").textContent = text(data.title);
  byId("about").append(...data.runs.map((made) => make("p", {}, `${text(made.name)}: ${text(made.about)}`)));
  const tiles = data.tiles.map((tile) =>
    make("dl", { class: "tile" }, make("dt", {}, text(tile.name)), make("dd", { class: "value" }, text(tile.value)), make("dd", { class: "note" }, text(tile.about))),
  );
  byId("summary").append(make("div", { class: "tiles" }, ...tiles));
  best();
  changes();
  byId("cells").append(searchable(data.cells, "All cells"));
  for (const { name, lines: said } of data.notes) {
    if (said.length) byId("cells").append(folded(`Notes on ${text(name)} (${said.length})`, lines(said)));
  }
  if (data.undrawn !== null) byId("figures").append(make("p", { class: "about" }, text(data.undrawn)));
  runs();
  themed();
})();
