/* The routing page: a token's decision at a router, from the data in the page. Text goes in as text only. */
(function () {
  "use strict";
  const root = document.getElementById("routing-page");
  window.addEventListener("error", (event) => { root.dataset.error = String(event.message); });
  const data = JSON.parse(document.getElementById("routing-data").textContent);
  const part = (name) => document.getElementById("rp-" + name);
  const N = data.experts;
  const COUNTS = [6, 10, 16, 24, 0];
  const state = {};

  // ---- numbers ----

  const decoded = new Map();
  function array(key, text, Type) {
    if (!decoded.has(key)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      decoded.set(key, new Type(bytes.buffer));
    }
    return decoded.get(key);
  }

  /* The experts that the model chose at a position of an MoE layer, heaviest first, and their weights. */
  function choice(doc, layer, pos) {
    const document_ = data.documents[doc];
    const start = (data.routers.indexOf(layer) * document_.tokens.length + pos) * data.top_k;
    const experts = array("c" + doc, document_.chosen, Uint16Array).slice(start, start + data.top_k);
    const weights = array("w" + doc, document_.weights, Float32Array).slice(start, start + data.top_k);
    return { experts: Array.from(experts), weights: Array.from(weights) };
  }

  function logitsAt(doc, place, pos) {
    const all = array("l" + doc + "," + place, data.documents[doc].logits[place], Float32Array);
    return Array.from(all.slice(pos * N, pos * N + N));
  }

  /* Every sender's name and its score for each expert, in logits. */
  function sendersAt(doc, place, by, pos) {
    const document_ = data.documents[doc];
    const stored = data.receivers[place].stored;
    const scale = array("s" + doc, document_.scale, Float32Array)[place * document_.tokens.length + pos];
    function rows(granularity) {
      const divided = stored[granularity];
      const nRows = divided.reduce((sum, [, slots, names]) => sum + slots + names.length, 0);
      const all = array([doc, place, granularity].join(), document_.scores[granularity][place], Int16Array);
      let row = 0;
      return divided.map(([at, slots, names]) => {
        const scores = [];
        for (let i = 0; i < slots + names.length; i++, row++) {
          const start = (pos * nRows + row) * N;
          scores.push(Array.from(all.slice(start, start + N), (q) => q * scale));
        }
        return { at, slots, names, scores };
      });
    }
    const finer = new Map((by === "layer" ? [] : rows(by)).map((group) => [group.at, group]));
    const senders = [];
    for (const whole of rows("layer")) {
      const { slots, names, scores } = finer.get(whole.at) || whole;
      const component = whole.names[0];
      const slotNames = slots === 0 ? [] : choice(doc, Number(component.slice(1)), pos).experts
        .map((expert) => component + "E" + expert);
      slotNames.concat(names).forEach((name, i) => senders.push({ name, scores: scores[i] }));
    }
    return senders;
  }

  /* 1 the best; ties go to the lower index. */
  function rankOf(expert, logits) {
    return 1 + logits.filter((logit, e) => logit > logits[expert] || (logit === logits[expert] && e < expert)).length;
  }

  /* All of what is said of one decision. */
  function decide(doc, place, pos, expert, by) {
    const layer = data.receivers[place].layer;
    const logits = logitsAt(doc, place, pos);
    const picked = choice(doc, layer, pos);
    const isChosen = (e) => picked.experts.includes(e);
    const ranks = logits.map((_, e) => rankOf(e, logits));
    const order = logits.map((_, e) => e).sort((a, b) => ranks[a] - ranks[b]);
    const chosen = isChosen(expert);
    // The other side of the boundary: for a plain top-k, rank K + 1 or rank K.
    const others = order.filter((e) => isChosen(e) !== chosen);
    const boundary = others.length === 0 ? null : chosen ? others[0] : others[others.length - 1];
    const pushes = boundary === null ? [] : sendersAt(doc, place, by, pos).map(({ name, scores }) => {
      const without = logits.map((logit, e) => logit - scores[e]);
      return { name, own: scores[expert], its: scores[boundary], push: scores[expert] - scores[boundary],
        rankWithout: rankOf(expert, without) };
    }).sort((a, b) => Math.abs(b.push) - Math.abs(a.push));
    const weight = chosen ? picked.weights[picked.experts.indexOf(expert)] : 0;
    return { layer, logits, picked, isChosen, ranks, order, chosen, boundary, pushes, weight,
      rank: ranks[expert], margin: boundary === null ? null : logits[expert] - logits[boundary],
      // Whether those chosen are the K best: not where a router chooses groups first.
      plain: picked.experts.every((e) => ranks[e] <= data.top_k) };
  }

  // ---- words ----

  function plainNumber(x) {
    const size = Math.abs(x);
    return size >= 0.01 || size === 0 ? size.toFixed(2) : size >= 0.0001 ? size.toPrecision(1) : size.toExponential(0);
  }
  const signed = (x, digits = 3) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
  const unsigned = (x, digits = 3) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);

  function longName(name) {
    const match = /^([AM])(\d+)(?:(H|E)(\d+)|(S)|(bias))?$/.exec(name);
    if (!match) return { embed: "the embedding", rounding: "what the stream lost by rounding" }[name] || name;
    const [, kind, layer, sub, index, shared, bias] = match;
    const what = sub ? (sub === "H" ? "head " : "expert ") + index : shared ? "shared experts" : bias ? "output bias"
      : kind === "A" ? "attention" : data.routers.includes(Number(layer)) ? "MoE" : "dense MLP";
    return "layer " + layer + ", " + what;
  }

  function sentence(d, expert) {
    let text = "Expert " + expert + (d.chosen ? " is chosen" : " is not chosen") + ", rank " + d.rank + " of " + N;
    if (d.chosen) text += " (weight " + unsigned(d.weight, 2) + ")";
    if (d.boundary === null) return text + "; every expert is chosen here, so there is no boundary.";
    text += ", " + plainNumber(d.margin) + " logits " + (d.margin >= 0 ? "above" : "below") + " the boundary, expert "
      + d.boundary + (d.chosen ? ", the best one left out" : ", the last one chosen")
      + " (rank " + d.ranks[d.boundary] + ").";
    if (!d.plain) text += data.grouped
      ? " This router chooses groups of experts first, so the chosen are not simply the highest."
      : " In the model's own rounding the choice came out otherwise than these exact logits have it.";
    const said = d.pushes.filter(({ push }) => push !== 0).slice(0, 2);
    const verb = (p) => (p.push > 0 ? "up" : "down") + " by " + plainNumber(p.push);
    if (said.length === 0) return text;
    const spoken = (p) => (p.name === "embed" ? "the embedding" : p.name);
    text += " Against expert " + d.boundary + ", " + spoken(said[0]) + " pushed it " + verb(said[0]);
    if (said.length > 1) text += " and " + spoken(said[1]) + " " + verb(said[1]);
    const without = said[0].rankWithout;
    text += ". Without " + spoken(said[0]) + " it would " + (without === d.rank ? "stay at rank " : "be at rank ") + without;
    if (d.plain && !data.grouped && (without <= data.top_k) !== d.chosen) {
      text += d.chosen ? ", and not chosen" : ", and chosen";
    }
    return text + ".";
  }

  // ---- drawing ----

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "text") made.textContent = value;
      else if (name === "style") Object.assign(made.style, value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }
  function drawn(tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const SHADES = [[243, 247, 251], [195, 217, 236], [127, 176, 214], [53, 119, 177], [11, 60, 111]];
  function shade(share) {
    const at = Math.max(0, Math.min(1, share)) * (SHADES.length - 1);
    const low = Math.min(Math.floor(at), SHADES.length - 2);
    return SHADES[low].map((c, i) => Math.round(c + (SHADES[low + 1][i] - c) * (at - low)));
  }

  /* A token's text; white space and what has no shape are made visible. */
  function tokenParts(text) {
    if (text === "") return [["∅", true]];
    const parts = [];
    const blank = /^\s+$/.test(text);
    for (const c of text) {
      const code = c.codePointAt(0);
      const hidden = code < 32 || (code >= 127 && code < 160) || /[\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/.test(c);
      if (c === "\n") parts.push(["↵\n", true]);
      else if (c === "\t") parts.push(["⇥", true]);
      else if (c === " " && blank) parts.push(["·", true]);
      else if (hidden) parts.push(["⟨" + code.toString(16).padStart(4, "0") + "⟩", true]);
      else parts.push([c, false]);
    }
    return parts;
  }

  let chips = [];
  function drawTokens() {
    const box = part("tokens");
    box.replaceChildren();
    chips = data.documents[state.doc].tokens.map((text, pos) => {
      const chip = element("span", { role: "option", class: "rp-token", tabindex: "-1", "aria-selected": "false" });
      let run = "";
      for (const [shown, hidden] of tokenParts(text)) {
        if (!hidden) { run += shown; continue; }
        chip.append(run, element("span", { class: "rp-space", text: shown }));
        run = "";
      }
      chip.append(run);
      chip.addEventListener("click", () => go({ pos }, chip));
      box.append(chip);
      return chip;
    });
    const document_ = data.documents[state.doc];
    if (document_.length > chips.length) {
      const more = " … " + (document_.length - chips.length) + " more tokens are not in this page";
      box.append(element("span", { class: "rp-space", text: more }));
    }
  }

  function colourTokens() {
    const { doc, expert, colour } = state;
    const layer = data.receivers[state.place].layer;
    const entries = chips.map((_, pos) => {
      const picked = choice(doc, layer, pos);
      const slot = picked.experts.indexOf(expert);
      const rank = rankOf(expert, logitsAt(doc, state.place, pos));
      return { weight: slot < 0 ? 0 : picked.weights[slot], chosen: slot >= 0, rank };
    });
    const heaviest = Math.max(...entries.map(({ weight }) => weight), 1e-9);
    entries.forEach((entry, pos) => {
      const share = colour === "weight" ? entry.weight / heaviest : (N - entry.rank) / Math.max(N - 1, 1);
      const blank = colour === "weight" && !entry.chosen;
      chips[pos].style.background = blank ? "" : "rgb(" + shade(share).join() + ")";
      chips[pos].style.color = !blank && share > 0.68 ? "white" : "";
      const is = entry.chosen ? "chosen, weight " + entry.weight.toFixed(3) : "not chosen";
      chips[pos].title = "position " + pos + ": expert " + expert + " has rank " + entry.rank + " of " + N + ", " + is;
      chips[pos].setAttribute("aria-selected", String(pos === state.pos));
      chips[pos].tabIndex = pos === state.pos ? 0 : -1;
    });
    const gradient = "linear-gradient(90deg," + SHADES.map((c) => "rgb(" + c.join() + ")").join() + ")";
    const bar = element("span", { class: "rp-bar", style: { background: gradient } });
    const name = "expert " + expert + " of M" + layer;
    const share = (entries.filter(({ chosen }) => chosen).length / entries.length * 100).toFixed(0) + "% of these tokens choose it";
    part("legend").replaceChildren(...(colour === "weight"
      ? ["Routing weight of " + name + ": 0", bar, (heaviest < 1e-8 ? "" : heaviest.toFixed(2)) + " · white: not chosen · " + share]
      : ["Rank of " + name + ": " + N, bar, "1 (best) · " + share]));
  }

  function drawExperts(d) {
    const token = tokenParts(data.documents[state.doc].tokens[state.pos]).map(([text]) => text.trim() || text).join("");
    part("experts-title").textContent = "Experts of M" + d.layer + " at “" + token + "”, position " + state.pos;
    const low = Math.min(...d.logits), high = Math.max(...d.logits), width = high - low || 1;
    const x = (logit) => 4 + 92 * (logit - low) / width;
    const last = d.order[data.top_k - 1], next = d.order[data.top_k];
    const edge = next === undefined ? null : (d.logits[last] + d.logits[next]) / 2;
    const box = part("experts"), focused = box.contains(document.activeElement);
    box.replaceChildren();
    d.order.forEach((expert, i) => {
      const chosen = d.isChosen(expert), logit = d.logits[expert], track = element("span", { class: "rp-track" });
      if (edge !== null) {
        const from = Math.min(x(edge), x(logit)), side = logit >= edge ? "rp-raises" : "rp-lowers";
        track.append(element("i", { class: "rp-zero", style: { left: x(edge) + "%" } }),
          element("i", { class: "rp-stem " + side, style: { left: from + "%", width: Math.abs(x(logit) - x(edge)) + "%" } }));
      }
      const colour = edge === null || logit >= edge ? "var(--raises)" : "var(--lowers)";
      track.append(element("i", { class: "rp-dot",
        style: { left: x(logit) + "%", borderColor: colour, background: chosen ? colour : "white" } }));
      const weight = chosen ? d.picked.weights[d.picked.experts.indexOf(expert)].toFixed(3) : "–";
      const row = element("div", { role: "option", class: "rp-expert " + (chosen ? "rp-chosen" : "rp-out"),
        "aria-selected": String(expert === state.expert), tabindex: expert === state.expert ? "0" : "-1",
        "aria-label": "rank " + d.ranks[expert] + ", expert " + expert + ", logit " + unsigned(logit)
          + (chosen ? ", chosen with weight " + weight : ", not chosen") },
      element("span", { text: d.ranks[expert] }), element("span", { text: "E" + expert }), track,
      element("span", { text: unsigned(logit, 2) }), element("span", { text: weight }));
      row.addEventListener("click", () => go({ expert }, row));
      box.append(row);
      if (d.plain && i === data.top_k - 1 && next !== undefined) {
        box.append(element("div", { class: "rp-edge", "aria-hidden": "true", text: "boundary: top " + data.top_k + " above" }));
      }
    });
    const selected = box.querySelector('[aria-selected="true"]');
    if (focused) selected.focus({ preventScroll: true });
    const top = selected.offsetTop - box.offsetTop;
    if (top < box.scrollTop || top + selected.offsetHeight > box.scrollTop + box.clientHeight) {
      box.scrollTop = top - box.clientHeight / 2;
    }
  }

  /* The largest pushes, the others together, and the margin that they end at. */
  function steps(d) {
    // One left over is shown itself.
    const n = state.count === 0 || d.pushes.length <= state.count + 1 ? d.pushes.length : state.count;
    const shown = d.pushes.slice(0, n), rest = d.pushes.slice(n);
    const sum = (key) => rest.reduce((total, p) => total + p[key], 0);
    if (rest.length > 0) {
      shown.push({ name: rest.length + " other senders",
        own: sum("own"), its: sum("its"), push: sum("push"), rankWithout: null, rest: true });
    }
    return shown;
  }

  function drawWaterfall(d) {
    const holder = part("waterfall");
    part("waterfall-title").textContent = d.boundary === null ? "No boundary"
      : "What puts expert " + state.expert + (d.margin >= 0 ? " above" : " below") + " expert " + d.boundary;
    holder.replaceChildren();
    if (d.boundary === null) return;
    const list = steps(d), rowHeight = list.length > 14 ? 22 : 29, top = 8;
    const width = Math.max(holder.clientWidth, 320), height = top + (list.length + 1) * rowHeight + 30;
    let from = 0;
    const spans = list.map(({ push }) => { const span = [from, from + push]; from += push; return span; });
    const ends = spans.flat().concat([0, d.margin]);
    const low = Math.min(...ends), high = Math.max(...ends), range = high - low || 1;
    const label = Math.min(150, 16 + 7.4 * Math.max(6, ...list.map(({ name }) => name.length)));
    const left = label + 56, right = width - 58;
    const x = (value) => left + (right - left) * (value - low) / range;
    const svg = drawn("svg", { viewBox: "0 0 " + width + " " + height, height, role: "img",
      "aria-label": "Waterfall of the contributions; the table below has the same numbers" });
    const bottom = top + (list.length + 1) * rowHeight + 4;
    const step = niceStep(range / 5);
    for (let k = Math.ceil(low / step); k * step <= high + 1e-9; k++) {
      const value = k * step, at = x(value);
      svg.append(drawn("line", { x1: at, x2: at, y1: top, y2: bottom, stroke: k === 0 ? "#93a1b0" : "#e3e8ee" }),
        drawn("text", { x: at, y: bottom + 15, "text-anchor": "middle", class: "rp-dim" },
          unsigned(value, Math.max(0, Math.min(6, -Math.floor(Math.log10(step)))))));
    }
    function bar(i, name, a, b, colour, title, bold) {
      const y = top + i * rowHeight, group = drawn("g", {});
      group.append(drawn("title", {}, title));
      group.append(drawn("text", { x: label, y: y + rowHeight / 2 + 4, "text-anchor": "end", "font-weight": bold ? 600 : 400 }, name));
      group.append(drawn("rect", { x: Math.min(x(a), x(b)), y: y + 4, width: Math.max(Math.abs(x(b) - x(a)), 1),
        height: rowHeight - 8, rx: 2, style: "fill:" + colour }));
      const raises = b >= a;
      group.append(drawn("text", { x: x(b) + (raises ? 5 : -5), y: y + rowHeight / 2 + 4, "text-anchor": raises ? "start" : "end",
        "font-weight": bold ? 600 : 400 }, bold ? unsigned(b - a) : signed(b - a)));
      svg.append(group);
    }
    list.forEach((p, i) => {
      const [a, b] = spans[i], colour = p.push >= 0 ? "var(--raises)" : "var(--lowers)";
      bar(i, p.name, a, b, colour, (p.rest ? p.name : p.name + ", " + longName(p.name)) + ": " + signed(p.push, 4) + " logits");
      const y = top + (i + 1) * rowHeight;
      svg.append(drawn("line", { x1: x(b), x2: x(b), y1: y - 4, y2: y + 4, stroke: "#93a1b0" }));
    });
    bar(list.length, "margin", 0, d.margin, "var(--ink)", "margin: " + unsigned(d.margin, 4) + " logits", true);
    svg.append(drawn("line", { x1: 0, x2: width, y1: top + list.length * rowHeight, y2: top + list.length * rowHeight,
      stroke: "#c9d2dc" }));
    holder.append(svg);
  }

  function niceStep(rough) {
    const power = Math.pow(10, Math.floor(Math.log10(rough)));
    return power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  }

  function drawTable(d) {
    const { expert } = state, body = part("table"), number = { class: "number" };
    body.replaceChildren();
    const heads = d.boundary === null ? [] : ["sender", "", "adds to expert " + expert,
      "adds to expert " + d.boundary, "pushes by (logits)", "rank of expert " + expert + " without it"];
    part("table-head").replaceChildren(...heads.map((text, i) => element("th", i > 1 ? { ...number, text } : { text })));
    if (d.boundary === null) return;
    const list = steps(d);
    for (const p of list) {
      let rank = "";
      const attributes = { ...number };
      if (p.rankWithout !== null) {
        const flips = d.plain && !data.grouped && (p.rankWithout <= data.top_k) !== d.chosen;
        if (p.rankWithout === d.rank) attributes.class += " rp-same";
        rank = p.rankWithout === d.rank ? String(d.rank) : d.rank + " → " + p.rankWithout;
        if (flips) { rank += d.chosen ? ", left out" : ", chosen"; attributes.class += " rp-flip"; }
      }
      body.append(element("tr", {}, element("td", { class: "rp-name", text: p.name }),
        element("td", { class: "lead rp-name", text: p.rest ? "together" : longName(p.name) }),
        element("td", { ...number, text: signed(p.own) }), element("td", { ...number, text: signed(p.its) }),
        element("td", { class: "number " + (p.push >= 0 ? "rp-up" : "rp-down"), text: signed(p.push) }),
        element("td", { ...attributes, text: rank })));
    }
    body.append(element("tr", { class: "rp-total" }, element("td", { text: "margin" }),
      element("td", { class: "lead rp-name", text: "difference of logits" }),
      element("td", { ...number, text: unsigned(d.logits[expert]) }),
      element("td", { ...number, text: unsigned(d.logits[d.boundary]) }),
      element("td", { ...number, text: unsigned(d.margin) }), element("td", { ...number, text: d.rank })));
  }

  const tiny = (x) => x === 0 ? "0" : x.toExponential(1).replace("e-", "e−");
  function drawSum(d) {
    if (d.boundary === null) { part("sum").textContent = ""; return; }
    const sum = d.pushes.reduce((total, { push }) => total + push, 0);
    part("sum").textContent = "The " + d.pushes.length + " pushes sum to " + unsigned(sum, 5) + " logits; the margin is "
      + unsigned(d.margin, 5) + " (difference " + tiny(Math.abs(sum - d.margin)) + ")."
      + (state.by === "expert" ? " Experts that were not chosen add nothing and are no senders here." : "")
      + " “Rank without it”: the sender's score taken away from the logits of all experts, the scale of the token kept.";
  }

  function drawNote() {
    const { quantisation, completeness, rounding, model_logits: gate } = data.errors;
    let text = "Before they were stored, the scores summed to every router's logits to " + tiny(completeness)
      + " of the largest logit. They are stored as 16-bit integers with a scale for each router and token, which moved "
      + "none by more than " + tiny(quantisation) + " logits; logits and weights are float32. The model's own gate gives "
      + "logits within " + tiny(gate) + " of these.";
    if (rounding !== null) {
      text += " In half precision the sums are no proof, because what the stream lost at its additions is a sender too, "
        + "“rounding”; but rounding is at most " + plainNumber(rounding) + " of what rounding can be"
        + (rounding <= 1 ? "." : ", so the senders are not all that the routers read.");
    }
    const left = data.left_out.map((by) => "senders by " + by);
    if (data.n_dropped) left.push(data.n_dropped + (data.n_dropped === 1 ? " document" : " documents"));
    const limit = " (these data may take " + (data.budget / 1e6).toPrecision(2) + " MB)";
    if (data.documents.some((d) => d.length > d.tokens.length)) {
      text += " Documents are cut to their first " + Math.max(...data.documents.map((d) => d.tokens.length))
        + " tokens" + limit + "; nothing that comes later changes these.";
    }
    if (left.length) text += " Left out" + limit + ": " + left.join(", ") + ".";
    part("note").textContent = text;
  }

  // ---- state: in the address, so that a view can be linked ----

  function draw() {
    const d = decide(state.doc, state.place, state.pos, state.expert, state.by);
    colourTokens();
    part("document").value = String(state.doc);
    part("layer").value = String(state.place);
    part("count").value = String(state.count);
    for (const group of ["by", "colour"]) {
      for (const button of part(group).querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button.dataset.value === state[group]));
      }
    }
    part("sentence").textContent = sentence(d, state.expert);
    drawExperts(d);
    drawWaterfall(d);
    drawTable(d);
    drawSum(d);
    const shown = { rank: d.rank, boundary: d.boundary, margin: d.margin, chosen: d.chosen, weight: d.weight,
      top: d.pushes.length ? d.pushes[0].name : null, push: d.pushes.length ? d.pushes[0].push : null,
      without: d.pushes.length ? d.pushes[0].rankWithout : null, senders: d.pushes.length };
    for (const [name, value] of Object.entries(shown)) root.dataset[name] = String(value);
  }

  function address() {
    const { doc, pos, place, expert, by, colour, count } = state;
    return "#doc=" + doc + "&pos=" + pos + "&layer=" + data.receivers[place].layer + "&expert=" + expert + "&by=" + by
      + "&colour=" + colour + "&count=" + count;
  }

  function go(changes, focus) {
    const other = "doc" in changes && changes.doc !== state.doc;
    Object.assign(state, changes);
    if (other) { state.pos = Math.min(state.pos, data.documents[state.doc].tokens.length - 1); drawTokens(); }
    try { history.replaceState(null, "", address()); } catch (refused) { location.hash = address(); }
    draw();
    if (focus && focus.isConnected) focus.focus({ preventScroll: true });
  }

  /* What the address asks for, where it makes sense; true if it asks for anything. */
  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const whole = (name, n) => {
      const text = asked.get(name);
      return text !== null && /^\d+$/.test(text) && Number(text) < n ? Number(text) : null;
    };
    const doc = whole("doc", data.documents.length);
    if (doc !== null) state.doc = doc;
    const place = data.receivers.findIndex(({ layer }) => String(layer) === asked.get("layer"));
    if (place >= 0) state.place = place;
    const length = data.documents[state.doc].tokens.length, pos = whole("pos", length);
    state.pos = pos !== null ? pos : Math.min(state.pos, length - 1);
    const expert = whole("expert", N);
    if (expert !== null) state.expert = expert;
    if (data.by.includes(asked.get("by"))) state.by = asked.get("by");
    if (["weight", "rank"].includes(asked.get("colour"))) state.colour = asked.get("colour");
    const count = Number(asked.get("count"));
    if (asked.has("count") && COUNTS.includes(count)) state.count = count;
    return asked.has("doc") || asked.has("pos");
  }

  function choiceOf(group, values) {
    for (const [value, text] of values) {
      const button = element("button", { type: "button", "data-value": value, text });
      button.addEventListener("click", () => go({ [group]: value }));
      part(group).append(button);
    }
  }

  function options(name, texts, values, change) {
    texts.forEach((text, i) => part(name).append(element("option", { value: values[i], text })));
    part(name).addEventListener("change", (event) => go(change(Number(event.target.value))));
  }

  /* The token in the row above or below that lies nearest. */
  function nearest(direction) {
    const here = chips[state.pos].getBoundingClientRect(), middle = here.left + here.width / 2;
    const boxes = chips.map((chip) => chip.getBoundingClientRect());
    const beyond = boxes.map((box) => box.top).filter((y) => direction * (y - here.top) > 4);
    if (beyond.length === 0) return state.pos;
    const row = direction > 0 ? Math.min(...beyond) : Math.max(...beyond);
    let best = state.pos, least = Infinity;
    boxes.forEach((box, pos) => {
      const away = Math.abs(box.left + box.width / 2 - middle);
      if (Math.abs(box.top - row) <= 4 && away < least) { best = pos; least = away; }
    });
    return best;
  }

  part("tokens").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = { ArrowLeft: () => state.pos - 1, ArrowRight: () => state.pos + 1, Home: () => 0,
      End: () => chips.length - 1, ArrowUp: () => nearest(-1), ArrowDown: () => nearest(1) };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    const pos = Math.max(0, Math.min(chips.length - 1, moves[event.key]()));
    go({ pos });
    chips[pos].focus();
  });
  part("experts").addEventListener("keydown", (event) => {
    const way = { ArrowUp: -1, ArrowDown: 1, Home: -N, End: N }[event.key];
    if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const { order, rank } = decide(state.doc, state.place, state.pos, state.expert, "layer");
    go({ expert: order[Math.max(0, Math.min(N - 1, rank - 1 + way))] });
  });

  options("document", data.documents.map(({ name, length }) => name + " (" + length + " tokens)"),
    data.documents.map((_, i) => i), (doc) => ({ doc }));
  options("layer", data.receivers.map(({ layer }) => "M" + layer), data.receivers.map((_, i) => i), (place) => ({ place }));
  options("count", COUNTS.map((n) => n === 0 ? "all senders" : n + " largest"), COUNTS, (count) => ({ count }));
  choiceOf("by", data.by.map((by) => [by, by]));
  choiceOf("colour", [["weight", "routing weight"], ["rank", "rank"]]);

  Object.assign(state, { doc: 0, place: Math.floor(data.receivers.length / 2), by: "layer", colour: "weight", count: 10 });
  state.pos = Math.min(12, data.documents[0].tokens.length - 1);
  state.expert = choice(0, data.receivers[state.place].layer, state.pos).experts[0];
  const linked = read();
  drawTokens();
  draw();
  if (linked) root.scrollIntoView();
  drawNote();
  window.addEventListener("hashchange", () => { read(); drawTokens(); draw(); });
  let wait = 0;
  window.addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(draw, 100); });
  root.dataset.ready = "true";
})();
