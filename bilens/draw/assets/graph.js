// An attribution graph: nodes by position and layer, edges by sign and size, a panel with the node that was opened.
//
// 1. edges and pairs become links, in two ways: pairs as pairs, or folded half to each member (`graph_layout.js`);
//    `regroup` makes one node of each group
// 2. `choose` takes the first nodes of an order that comes with the data, in which each has a path to the target
//    through those before it; what is pinned, opened or found comes with its strongest path; and the links between them
// 3. `place` gives every shown node its spot: columns are positions, rows are layers, a cell holds a block of nodes
// 4. links are painted on a canvas (thousands stay fluid); nodes are SVG elements, each with a name, to be focused
// 5. what a reader pins, renames and groups is kept in the page's address (`remember`), as is the number of nodes
const BilensGraph = (() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const START_NODES = 20, ROWS_IN_PANEL = 20, EXAMPLES = 3, HASTY = 800, PRINTED_WIDTH = 1000, PUSHES = 3, MARK = "#graph?";
  const { asPairs, ends, folded, isRest, layout, neighbour, nameSpots, short, together } = BilensGraphLayout;
  const { curves, linkAt, samples, sum } = BilensGraphLayout;
  const SYMBOLS = {
    feature: (r) => `M${-r} 0a${r} ${r} 0 1 1 ${2 * r} 0a${r} ${r} 0 1 1 ${-2 * r} 0Z`,
    error: (r) => `M0 ${-1.25 * r}L${1.25 * r} 0L0 ${1.25 * r}L${-1.25 * r} 0Z`,
    embedding: (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
    mlp: (r) => `M${-1.3 * r} ${-0.8 * r}H${1.3 * r}V${0.8 * r}H${-1.3 * r}Z`,
    eigencircuit: (r) => `M${-1.2 * r} 0L${-0.6 * r} ${-r}H${0.6 * r}L${1.2 * r} 0L${0.6 * r} ${r}H${-0.6 * r}Z`,
    bias: (r) => `M0 ${-1.2 * r}L${1.1 * r} ${0.8 * r}H${-1.1 * r}Z`,
    target: (r) => `M0 ${-1.3 * r}l${1.1 * r} ${0.6 * r}v${1.4 * r}L0 ${1.3 * r}l${-1.1 * r} ${-0.6 * r}v${-1.4 * r}Z`,
  };
  SYMBOLS.other = SYMBOLS.feature;

  const element = (name, attributes = {}, ...children) => {
    const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (typeof value === "function") made.addEventListener(key, value);
      else if (value !== false && value !== null) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  };
  const number = (value) => {
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : value.toPrecision(4);
    return (value > 0 ? "+" : "") + text.replace("-", "−");
  };
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;
  const sign = (value) => (value < 0 ? "negative" : "positive");
  const count = (n) => n.toLocaleString("en");

  const draw = (root, data) => {
    const fresh = { joint: false, placed: false, x: 0, y: 0, r: 0, members: null };
    const base = data.nodes.map((node, index) => ({ ...node, ...fresh, index, given: node.name, up: data.up[index] }));
    const target = base.findIndex((node) => node.kind === "target");
    const indexOf = new Map(base.map((node) => [node.id, node.index]));
    const baseWays = { pairs: asPairs(data), folded: folded(data) };
    const start = Math.min(START_NODES, data.order.length);
    const state = {
      n: start, way: "pairs", rest: false, query: "", // as chosen in the bar
      pins: [...data.pinned], groups: data.groups.map(([label, ...members]) => ({ label, members })),
      opened: -1, hovered: null, current: target, // nodes; `hovered` is a {node} or a {link}
    };
    let nodes = base, ways = baseWays; // with a node for each group after the others
    let standIn = (index) => index; // the group of a node that is in one
    let laid = null; // the layout
    let shown = []; // links
    const scales = { true: 1, false: 1 }; // the largest influence among them, into MLPs' outputs and elsewhere
    let found = new Set(); // nodes that match the search
    let later = 0; // the timer of what was left out in haste
    let column = { left: 0, right: 0 }, room = 0; // the target's, and the width that was seen
    let sampled = null; // points along each shown link, for the mouse

    data.pairs.forEach(([, , index]) => { base[index].joint = true; });
    const sizeOf = (link) => Math.sqrt(Math.min(1, link.influence / scales[nodes[link.target].joint]));
    const describe = (node) => (node.where ? `${node.name} (${node.where})` : node.name);
    const isChosen = (node) => !isRest(node) && node.kind !== "target";
    const touches = (link, index) => link.target === index || link.sources.includes(index);
    const sourcesText = ({ sources: [i, j] }) =>
      j === undefined ? nodes[i].name : i === j ? `${nodes[i].name} ²` : `${nodes[i].name} × ${nodes[j].name}`;

    // --- the elements ---

    const name = `bilens-pairs-${Math.random().toString(36).slice(2)}`;
    const radio = (way, text) =>
      element("label", {},
        element("input", { type: "radio", name, value: way, checked: way === state.way, change: () => set({ way }) }),
        text);
    const search = element("input", {
      type: "search", placeholder: "label, number or token", "aria-keyshortcuts": "/", autocomplete: "off",
      "aria-label": "Search nodes", input: () => set({ query: search.value }), keydown: (event) => searchKey(event),
    });
    const slider = element("input", {
      type: "range", min: 1, max: Math.max(1, data.order.length), step: 1, "aria-label": "Number of nodes shown",
      input: () => set({ n: Number(slider.value) }, true),
    });
    const numberShown = element("output", {});
    const tool = (text, title, click) => element("button", { type: "button", class: "tool", title, click }, text);
    const group = tool("group pinned", "Make one node of the pinned ones", () => groupPinned());
    const undo = tool("undo edits", "Forget pins, names and groups made here", () => forget());
    const rest = element("input", { type: "checkbox", change: () => set({ rest: rest.checked }) });
    const theme = element("button", { type: "button", class: "theme", click: () => toggleTheme() });
    const bar = element("div", { class: "bar", role: "group", "aria-label": "What is shown" },
      element("label", { class: "search" }, element("kbd", {}, "/"), search),
      element("label", { class: "slider" }, "show", slider, numberShown),
      ...(data.pairs.length ? [element("fieldset", {}, element("legend", {}, "pairs"), radio("pairs", "joined"),
        radio("folded", "halved"))] : []),
      element("label", {}, rest, "biases and pruned parts"),
      group, undo,
      tool("copy SVG", "Copy the graph as it is shown, as SVG", () => copy("svg")),
      tool("copy PNG", "Copy the graph as it is shown, as a picture", () => copy("png")),
      theme);
    const status = element("p", { class: "status", role: "status" });
    const headline = element("div", { class: "headline" });
    const shareBar = element("div", { class: "shares" });
    const canvas = element("canvas", { "aria-hidden": "true" });
    const brush = canvas.getContext("2d");
    const backdrop = element("canvas"); // the shown links, painted once per change and laid under what is lit
    const grid = element("svg:svg", { class: "grid", "aria-hidden": "true" });
    const feet = element("svg:g", { class: "feet", "aria-hidden": "true" }); // over the canvas: on paper it is opaque
    const dots = element("svg:g", { class: "nodes" });
    const labels = element("svg:g", { class: "labels", "aria-hidden": "true" });
    const svg = element("svg:svg", { role: "group", "aria-label": `Attribution graph of ${data.target}` },
      feet, dots, labels);
    const stage = element("div", { class: "stage" }, grid, canvas, svg);
    const rows = element("div", { class: "rows", "aria-hidden": "true" });
    const scroll = element("div", { class: "scroll" }, rows, stage);
    const panel = element("aside", { class: "panel", "aria-label": "The node opened", tabindex: -1 });
    const tip = element("div", { class: "tip", role: "tooltip", hidden: true });
    const symbols = {
      feature: "feature", ...(base.some((node) => node.kind === "eigencircuit") && { eigencircuit: "eigencircuit" }),
      error: "SAE error", embedding: "token", target: "target",
    };
    const legend = element("p", { class: "legend" },
      ...Object.entries(symbols).map(([kind, text]) =>
        element("span", {}, element("svg:svg", { viewBox: "-8 -8 16 16", class: "nodes" },
          element("svg:path", { class: kind, d: SYMBOLS[kind](5) })), text)),
      element("span", {}, element("i", { class: "positive" }), "adds"),
      element("span", {}, element("i", { class: "negative" }), "takes away"),
      ...(data.pairs.length
        ? [element("span", {}, element("i", { class: "joint" }), "a pair: what two features do together")] : []),
      element("span", { class: "keys" }, element("kbd", {}, "← ↑ ↓ →"), "move", element("kbd", {}, "Enter"), "open",
        element("kbd", {}, "P"), "pin", element("kbd", {}, "Esc"), "close", element("kbd", {}, "/"), "search"));
    root.className = "bilens-graph";
    root.append(headline, shareBar, bar, status, element("div", { class: "main" }, scroll, panel), legend, tip);

    function addDot(node) {
      node.shape = element("svg:path", {});
      node.dot = element("svg:g", {
        class: `node ${node.kind}${node.members ? " group" : ""}`, role: "button", tabindex: -1, "data-node": node.id,
        click: () => open(node.index), focus: () => focused(node.index), blur: () => hover(null),
        mouseenter: (event) => hover({ node: node.index }, event), mouseleave: () => hover(null),
      }, node.shape);
      if (node.members) node.dot.append(element("svg:text", { class: "count" }, String(node.members.length)));
      dots.append(node.dot);
    }

    function spoken(node) {
      return `${describe(node)}, ${node.members ? "group" : node.kind}, value ${number(node.value)}, ` +
        `influence ${percent(node.influence)}`;
    }

    // --- groups ---

    // A group stands where its most influential member does; what goes into it and out of it is that of all its members.
    function regroup() {
      for (const node of nodes.slice(base.length)) node.dot.remove();
      const within = new Map();
      const groups = state.groups.map(({ label, members }, place) => {
        const index = base.length + place, all = members.map((member) => base[member]);
        const first = all.reduce((best, node) => (node.influence > best.influence ? node : best));
        members.forEach((member) => within.set(member, index));
        return {
          ...first, ...fresh, index, id: `group ${place + 1}`, name: label, members, key: "", measure: "sum of values",
          where: `${count(all.length)} nodes as one, ${first.where}`, joint: all.some((node) => node.joint),
          value: sum(all, (node) => node.value), influence: Math.min(1, sum(all, (node) => node.influence)),
          expanded: all.some((node) => node.expanded),
          relative_error: Math.max(...all.map((node) => node.relative_error)),
        };
      });
      groups.forEach(addDot);
      nodes = [...base, ...groups];
      standIn = (index) => (within.has(index) ? within.get(index) : index);
      const taken = (links) => (groups.length ? together(links, standIn) : links);
      ways = { pairs: taken(baseWays.pairs), folded: taken(baseWays.folded) };
      for (const node of nodes) {
        node.haystack = `${node.name} ${node.id} ${node.where}`.toLowerCase();
        node.dot.setAttribute("aria-label", spoken(node));
      }
      if (state.current >= nodes.length) state.current = target;
      if (state.opened >= nodes.length) state.opened = -1;
    }

    const membersOf = (index) => nodes[index].members || [index];
    const isPinned = (index) => membersOf(index).every((member) => state.pins.includes(member));

    function pin(index) {
      const own = membersOf(index).filter((member) => isChosen(base[member]));
      const others = state.pins.filter((member) => !own.includes(member));
      edit({ pins: isPinned(index) ? others : [...others, ...own] });
    }

    function rename(index, text) {
      const node = nodes[index], name = text.trim();
      if (node.members) state.groups[index - base.length].label = name || base[node.members[0]].name;
      else node.name = name || node.given;
      edit({});
    }

    function ungroup(index) {
      edit({ groups: state.groups.filter((_, place) => place !== index - base.length), opened: -1 });
    }

    function groupPinned() {
      const members = state.pins.filter((member) => isChosen(base[member]));
      if (members.length < 2) return;
      const first = members.reduce((best, index) => (base[index].influence > base[best].influence ? index : best));
      const others = state.groups.map(({ label, members: own }) =>
        ({ label, members: own.filter((member) => !members.includes(member)) }));
      const groups = [...others.filter(({ members: own }) => own.length > 1), { label: base[first].name, members }];
      edit({ groups, pins: [], opened: base.length + groups.length - 1 });
    }

    function forget() {
      for (const node of base) node.name = node.given;
      edit({ pins: [...data.pinned], groups: data.groups.map(([label, ...members]) => ({ label, members })), opened: -1 });
    }

    function edit(change) {
      Object.assign(state, change);
      regroup();
      redraw();
      fillPanel();
      remember();
    }

    // --- the address ---

    const ids = (indices) => indices.map((index) => base[index].id);
    const groupIds = (groups) => groups.map(({ label, members }) => [label, ...ids(members)]);

    function edits() {
      const names = Object.fromEntries(base.filter((node) => node.name !== node.given).map((node) => [node.id, node.name]));
      const own = [ids(state.pins), names, groupIds(state.groups)].map((value) => JSON.stringify(value));
      const given = data.groups.map(([label, ...members]) => ({ label, members }));
      const asGiven = [ids(data.pinned), {}, groupIds(given)].map((value) => JSON.stringify(value));
      return own.map((value, place) => (value === asGiven[place] ? null : value));
    }

    function remember() {
      const [pins, names, groups] = edits();
      const kept = { n: state.n === start ? null : String(state.n), pins, names, groups };
      const parts = Object.entries(kept).filter(([, value]) => value !== null);
      undo.disabled = parts.every(([key]) => key === "n");
      if (!parts.length && !location.hash.startsWith(MARK)) return;
      const text = parts.map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
      try {
        history.replaceState(null, "", parts.length ? MARK + text : location.pathname + location.search);
      } catch (refused) { /* in a notebook's frame there is no address to keep them in */ }
    }

    // Whatever stands there was maybe written by hand: what is not of this graph is passed over.
    function recall() {
      if (!location.hash.startsWith(MARK)) return;
      const given = new URLSearchParams(location.hash.slice(MARK.length));
      const read = (key, fits, otherwise) => {
        try {
          const value = JSON.parse(given.get(key));
          return value !== null && fits(value) ? value : otherwise;
        } catch (broken) { return otherwise; }
      };
      const known = (names) => names.filter((name) => indexOf.has(name)).map((name) => indexOf.get(name));
      const free = (members) => [...new Set(members)].filter((member) => isChosen(base[member]));
      const n = Number(given.get("n"));
      if (given.has("n") && n >= 1) state.n = Math.min(Math.round(n), data.order.length);
      if (given.has("pins")) state.pins = free(known(read("pins", Array.isArray, [])));
      for (const [id, name] of Object.entries(read("names", (value) => typeof value === "object", {})))
        if (indexOf.has(id)) base[indexOf.get(id)].name = String(name);
      if (!given.has("groups")) return;
      const taken = new Set();
      state.groups = read("groups", Array.isArray, []).filter(Array.isArray).map(([label, ...names]) => {
        const members = free(known(names)).filter((member) => !taken.has(member));
        members.forEach((member) => taken.add(member));
        return { label: String(label), members };
      }).filter(({ members }) => members.length > 1);
    }

    // --- what is shown, and where ---

    function choose() {
      const query = state.query.trim().toLowerCase();
      found = new Set(query ? nodes.filter((node) => node.haystack.includes(query)
        && standIn(node.index) === node.index).map((node) => node.index) : []);
      const wanted = new Set(base.filter((node) => node.kind === "target").map((node) => node.index));
      const add = (index) => { // with its strongest path
        for (let at = index; at >= 0 && !wanted.has(at); at = base[at].up) wanted.add(at);
      };
      data.order.slice(0, state.n).forEach((index) => wanted.add(index));
      state.pins.forEach(add);
      [state.opened, ...found].filter((index) => index >= 0).flatMap(membersOf).forEach(add);
      base.forEach((node) => { node.wanted = wanted.has(node.index); });
      for (const node of nodes)
        node.placed = node.members ? node.members.some((member) => wanted.has(member))
          : node.wanted && standIn(node.index) === node.index;
      const usable = (index) => nodes[index].placed || (state.rest && isRest(nodes[index]));
      shown = ways[state.way].filter((link) => nodes[link.target].placed && link.sources.every(usable));
      for (const link of shown) for (const source of link.sources) nodes[source].placed = true;
      for (const joint of [false, true])
        scales[joint] = Math.max(1e-300, ...shown.filter((link) => nodes[link.target].joint === joint)
          .map((link) => link.influence));
      const placed = sum(nodes, (node) => (node.placed && !isRest(node) && node.kind !== "target" ? 1 : 0));
      const all = sum(base, (node) => (isChosen(node) ? 1 : 0));
      const matching = found.size === 1 ? "node matches" : "nodes match";
      const matches = query ? ` ${count(found.size)} ${matching} “${state.query}”.` : "";
      slider.value = state.n;
      numberShown.value = `${count(state.n)} ${state.n === 1 ? "node" : "nodes"}`;
      group.disabled = state.pins.length < 2;
      group.textContent = state.pins.length ? `group pinned (${state.pins.length})` : "group pinned";
      const shares = showShares();
      const through = percent(shares.tokens + shares.biases + shares.errors + shares.whole);
      status.textContent = `${count(placed)} of ${count(all)} nodes are shown, paths best first from the target down. ` +
        `Through them ${through} of its influence runs to where it ends; ${percent(shares.hidden)} leads to nodes that ` +
        `are not shown.${matches}`;
    }

    // Where the influence ends, as one bar.
    function showShares() {
      const shares = ends(base, baseWays.folded, (index) => base[index].wanted);
      const said = { tokens: "tokens", biases: "biases", errors: "SAE errors", whole: "not taken apart", hidden: "not shown" };
      const parts = Object.entries(said).filter(([key]) => shares[key] >= 5e-4);
      shareBar.replaceChildren(
        element("span", { class: "what" }, "where its influence ends"),
        element("span", { class: "stack", role: "img",
          "aria-label": parts.map(([key, text]) => `${text} ${percent(shares[key])}`).join(", ") },
          ...parts.map(([key]) => element("i", { class: key, style: `flex-grow:${shares[key]}` }))),
        ...parts.map(([key, text]) => element("span", { class: "part" }, element("i", { class: key }),
          `${text} ${percent(shares[key])}`)));
      return shares;
    }

    // The first line: what the model says, what pushes for and against the target, and what interventions say of that.
    function fillHeadline() {
      const into = ways.folded.filter((link) => link.target === target);
      const open = into.filter((link) => !isRest(nodes[link.sources[0]]) && nodes[link.sources[0]].kind !== "error");
      const pushes = (way) => open.filter((link) => link.weight * way > 0)
        .sort((a, b) => (b.weight - a.weight) * way).slice(0, PUSHES)
        .flatMap((link, place) => [place ? ", " : " ", button(link.sources[0], true), ` ${number(link.weight)}`]);
      const total = (fits) => sum(into.filter((link) => fits(nodes[link.sources[0]])), (link) => link.weight);
      const pruned = total((node) => node.kind === "other" && node.id !== "other errors");
      const errors = total((node) => node.kind === "error" || node.id === "other errors");
      const roots = base.filter((node) => node.kind === "target");
      const lines = [];
      if (data.predicted.length)
        lines.push(element("p", {}, "The model's next token: ", ...data.predicted.flatMap(([token, p], place) =>
          [place ? ", " : "", element("b", {}, token), ` ${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`]), "."));
      if (roots.length === 1)
        lines.push(element("p", {}, element("b", {}, data.target), ` ${number(base[target].value)}. For it:`, ...pushes(1),
          ". Against it:", ...pushes(-1), `. SAE errors ${number(errors)}, pruned parts ${number(pruned)}.`));
      if (data.verdict)
        lines.push(element("p", {}, element("b", { class: `verdict ${data.verdict[0]}` }, data.verdict.slice(0, 2).join(" ")),
          ` by intervention: ${data.verdict[2]}`));
      headline.replaceChildren(...lines);
    }

    function place(printedWidth) {
      const isInView = () => column.left >= scroll.scrollLeft && column.right <= scroll.scrollLeft + room;
      const wasInView = isInView();
      room = scroll.clientWidth - rows.offsetWidth;
      const width = Math.max((printedWidth || scroll.clientWidth) - rows.offsetWidth - 2, 240);
      const height = Math.min(Math.max(innerHeight - 230, 480), 900);
      const placed = laid = layout(nodes, data.tokens, data.rows, width, height, data.pairs.length > 0);
      column = placed.columns.find(({ position }) => position === nodes[target].position) || placed.columns[0];
      frame(placed);
      // Where the graph gets wider than its place, the target stays in view.
      if (!printedWidth && wasInView && !isInView()) scroll.scrollLeft = (column.left + column.right - room) / 2;
      for (const node of nodes) {
        node.dot.style.display = node.placed ? "" : "none";
        if (!node.placed) continue;
        node.dot.setAttribute("transform", `translate(${node.x.toFixed(1)} ${node.y.toFixed(1)})`);
        node.shape.setAttribute("d", SYMBOLS[node.kind](node.r));
        node.dot.classList.toggle("pinned", isPinned(node.index));
      }
      rove(nodes[state.current].placed ? state.current : target);
    }

    function frame({ columns, bands, width, height, foot, turned }) {
      const ratio = devicePixelRatio || 1;
      for (const surface of [canvas, backdrop]) {
        Object.assign(surface, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
        surface.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
      }
      for (const part of [canvas, stage]) Object.assign(part.style, { width: `${width}px`, height: `${height}px` });
      const size = { width, height, viewBox: `0 0 ${width} ${height}` };
      for (const drawn of [grid, svg])
        for (const [key, value] of Object.entries(size)) drawn.setAttribute(key, value);
      rows.style.height = `${height}px`;
      const full = data.rows.map((text, row) => ({ text, ...bands[row] })).filter(({ top, bottom }) => bottom > top);
      rows.replaceChildren(...full.map(({ text, middle }) => element("span", { style: `top:${middle}px` }, text)));
      const marks = full.map(({ top, bottom }, row) =>
        element("svg:rect", { x: 0, y: top, width, height: bottom - top, class: row % 2 ? "odd" : "even" }));
      const names = [];
      columns.forEach(({ left, right, token, position }) => {
        if (left) marks.push(element("svg:path", { d: `M${left} 0V${height - foot}` }));
        const x = (left + right) / 2, y = height - foot + 18;
        const turn = turned ? { transform: `translate(${x + 4} ${height - foot + 8}) rotate(-90)` } : { x, y };
        if (position >= 0)
          names.push(element("svg:text", { class: turned ? "turned" : "token", ...turn }, short(token)),
            ...(turned ? [] : [element("svg:text", { class: "position", x, y: y + 15 }, String(position))]));
      });
      grid.replaceChildren(...marks);
      feet.replaceChildren(...names);
    }

    // --- painting ---

    const spotlight = () =>
      (state.hovered && state.hovered.node !== undefined ? state.hovered.node : standIn(state.opened));

    function trace(on, link, ink, size, alpha) {
      const { parts, joint } = curves(nodes, link);
      on.strokeStyle = on.fillStyle = ink[sign(link.weight)];
      on.globalAlpha = alpha;
      on.lineWidth = 0.5 + 4.5 * size;
      on.beginPath();
      for (const [x0, y0, ...curve] of parts) {
        on.moveTo(x0, y0);
        on.bezierCurveTo(...curve);
      }
      on.stroke();
      if (!joint) return;
      on.globalAlpha = Math.min(1, alpha * 1.6);
      on.beginPath();
      on.arc(joint[0], joint[1], 1.6 + 2.4 * size, 0, 7);
      on.fill();
    }

    function inks() {
      const style = getComputedStyle(root);
      return { positive: style.getPropertyValue("--positive"), negative: style.getPropertyValue("--negative") };
    }

    // In haste, while the slider moves, without the faintest: those follow once it rests.
    function paintBackdrop(hasty = false) {
      const on = backdrop.getContext("2d"), ink = inks();
      const thin = Math.min(1, Math.sqrt(300 / (shown.length || 1))); // many faint lines add up
      on.clearRect(0, 0, backdrop.width, backdrop.height);
      const drawn = shown.map((link) => ({ link, size: sizeOf(link) })).sort((a, b) => b.size - a.size);
      const painted = hasty ? Math.min(HASTY, drawn.length) : drawn.length;
      for (let place = painted - 1; place >= 0; place--)
        trace(on, drawn[place].link, ink, drawn[place].size, 0.16 * thin + 0.6 * drawn[place].size);
      clearTimeout(later);
      if (painted < drawn.length) later = setTimeout(() => { paintBackdrop(); paint(); }, 150);
    }

    function paint() {
      const ink = inks();
      const lit = spotlight(), hoveredLink = state.hovered && state.hovered.link;
      const near = new Set(lit < 0 ? [] : [lit]);
      const drawable = (link) => nodes[link.target].placed && link.sources.every((source) => nodes[source].placed);
      const own = lit < 0 ? [] : ways[state.way].filter((link) => touches(link, lit) && drawable(link));
      const strongest = own.length ? own[0].influence : 1;
      const dimmed = lit >= 0 || hoveredLink || found.size;
      brush.clearRect(0, 0, canvas.width, canvas.height);
      brush.globalAlpha = dimmed ? 0.2 : 1;
      const ratio = devicePixelRatio || 1;
      brush.drawImage(backdrop, 0, 0, backdrop.width / ratio, backdrop.height / ratio);
      for (let place = own.length - 1; place >= 0; place--) {
        const size = Math.sqrt(own[place].influence / strongest);
        if (size < 0.03) continue;
        [...own[place].sources, own[place].target].forEach((index) => near.add(index));
        trace(brush, own[place], ink, 0.8 * size, 0.12 + 0.75 * size);
      }
      if (hoveredLink) {
        [...hoveredLink.sources, hoveredLink.target].forEach((index) => near.add(index));
        if (drawable(hoveredLink)) trace(brush, hoveredLink, ink, Math.max(0.5, sizeOf(hoveredLink)), 1);
      }
      for (const { dot, index } of nodes) {
        dot.classList.toggle("dim", Boolean(dimmed) && !near.has(index) && !found.has(index));
        dot.classList.toggle("found", found.has(index));
        dot.classList.toggle("near", Boolean(hoveredLink) && touches(hoveredLink, index));
        dot.classList.toggle("open", index === standIn(state.opened));
        dot.setAttribute("aria-pressed", String(index === standIn(state.opened)));
      }
      label(near);
    }

    // The names of what is lit, or else of the nodes that matter most.
    function label(near) {
      const lit = (node) => near.has(node.index) || found.has(node.index);
      const rank = (node) => (node.kind === "target" ? 8 : 0) + (lit(node) ? 4 : 0) + node.influence;
      const wanted = nodes.filter((node) => node.placed && node.kind !== "embedding" && node.kind !== "other"
        && (lit(node) || (!near.size && !found.size)));
      wanted.sort((a, b) => rank(b) - rank(a));
      labels.replaceChildren(...nameSpots(nodes, wanted, parseFloat(svg.getAttribute("width")))
        .map(({ x, y, anchor, text }) => element("svg:text", { x, y, "text-anchor": anchor }, text)));
    }

    // --- the mouse ---

    function linkText(link) {
      const via = link.via ? [element("br"), link.via === "direct"
        ? "directly, without attention" : `mostly via head ${link.via} (${number(link.viaWeight)})`] : [];
      const where = [...new Set([...link.sources, link.target].map((index) => nodes[index].where))].join(" → ");
      return [element("b", {}, number(link.weight)), ` ${sourcesText(link)} → ${nodes[link.target].name}`,
        element("br"), where, ...via, element("br"), `influence on the target ${percent(link.influence)}`];
    }

    function hover(what, event) {
      const same = what && state.hovered && what.link === state.hovered.link && what.node === state.hovered.node;
      state.hovered = what;
      tip.hidden = !what;
      if (what) {
        const node = nodes[what.node];
        tip.replaceChildren(...(node
          ? [element("b", {}, node.name), element("br"), node.where, element("br"),
            `value ${number(node.value)}, influence ${percent(node.influence)}`]
          : linkText(what.link)));
        const box = event && event.clientX ? { left: event.clientX, bottom: event.clientY }
          : node ? node.dot.getBoundingClientRect() : scroll.getBoundingClientRect();
        const own = tip.getBoundingClientRect();
        tip.style.left = `${Math.max(8, Math.min(box.left + 14, innerWidth - own.width - 12))}px`;
        tip.style.top = `${Math.max(8, Math.min(box.bottom + 14, innerHeight - own.height - 12))}px`;
      }
      if (!same) paint();
    }

    svg.addEventListener("mousemove", (event) => {
      if (event.target.closest(".node")) return;
      const box = svg.getBoundingClientRect();
      sampled = sampled || samples(nodes, shown);
      const link = shown[linkAt(sampled, event.clientX - box.left, event.clientY - box.top)] || null;
      if (link || state.hovered) hover(link && { link }, event);
    });
    svg.addEventListener("mouseleave", () => hover(null));
    svg.addEventListener("click", (event) => { if (!event.target.closest(".node")) open(-1); });

    // --- the keyboard ---

    function rove(index) {
      nodes[state.current].dot.setAttribute("tabindex", -1);
      state.current = index;
      nodes[index].dot.setAttribute("tabindex", 0);
    }

    function focused(index) {
      rove(index);
      if (nodes[index].dot.matches(":focus-visible")) hover({ node: index });
    }

    svg.addEventListener("keydown", (event) => {
      const node = nodes[state.current];
      if (event.key === "Enter" || event.key === " ") open(node.index);
      else if (event.key === "p" && !event.ctrlKey && !event.metaKey) {
        pin(node.index);
        nodes[state.current].dot.focus();
      }
      else if (event.key === "Home") nodes[target].dot.focus();
      else if (event.key.startsWith("Arrow")) {
        const next = neighbour(nodes, node, event.key);
        if (next) next.dot.focus();
      } else return;
      event.preventDefault();
    });
    root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || state.opened < 0) return;
      const { dot } = nodes[standIn(state.opened)];
      open(-1);
      dot.focus();
    });
    addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey) return;
      if (event.target.closest("input:not([type=range]), textarea")) return;
      event.preventDefault();
      search.focus();
    });

    function searchKey(event) {
      if (event.key === "Escape" && search.value) {
        event.stopPropagation();
        event.preventDefault();
        search.value = "";
        set({ query: "" });
      } else if (event.key === "Enter" && found.size) {
        const order = [...found].sort((a, b) => nodes[b].influence - nodes[a].influence);
        open(order[(order.indexOf(state.opened) + 1) % order.length]);
      }
    }

    // --- the panel ---

    function open(index) {
      state.hovered = null;
      tip.hidden = true;
      state.opened = index;
      if (index >= 0 && !nodes[standIn(index)].placed) redraw();
      if (index >= 0) rove(standIn(index));
      fillPanel();
      paint();
    }

    const button = (index, placed = elsewhere(index)) =>
      element("button", {
        type: "button", class: "to", "data-to": nodes[index].id, title: nodes[index].where, click: () => open(index),
      }, nodes[index].name, ...(placed ? [element("small", {}, nodes[index].at)] : []));
    const elsewhere = (index) => state.opened < 0 || nodes[index].position !== nodes[state.opened].position;

    // A table of links; hovering or focusing a row lights it up in the graph.
    function linkTable(links, cells, caption) {
      const largest = Math.max(...links.map((link) => Math.abs(link.weight)), 1e-300);
      const row = (link) => {
        const light = () => { state.hovered = { link }; paint(); };
        const unlight = () => { state.hovered = null; paint(); };
        const on = { mouseenter: light, mouseleave: unlight, focusin: light, focusout: unlight };
        const bar = `--w:${(100 * Math.abs(link.weight) / largest).toFixed(1)}%`;
        return element("tr", { ...on, "data-weight": link.weight },
          element("td", { class: `number ${sign(link.weight)}`, style: bar }, number(link.weight)),
          element("td", {}, ...cells(link)));
      };
      const body = element("tbody", {}, ...links.slice(0, ROWS_IN_PANEL).map(row));
      const table = element("table", {}, element("caption", {}, caption), body);
      if (links.length <= ROWS_IN_PANEL) return [table];
      const more = element("button", { type: "button", class: "more", click: () => {
        body.append(...links.slice(ROWS_IN_PANEL).map(row));
        more.remove();
      } }, `show all ${count(links.length)}`);
      return [table, more];
    }

    function from({ sources: [i, j], via }) {
      if (j !== undefined) return i === j ? [button(i), " ²"] : [button(i), " × ", button(j)];
      return via ? [button(i), element("small", {}, via === "direct" ? via : `via ${via}`)] : [button(i)];
    }

    const bySize = (links) => [...links].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));

    function fillPanel() {
      panel.replaceChildren(...(state.opened < 0 ? overview() : details(nodes[state.opened])));
      panel.scrollTop = 0;
    }

    function overview() {
      const roots = base.filter((node) => node.kind === "target");
      const targets = roots.map((node) => [roots.length > 1 ? node.name : "value", number(node.value)]);
      const first = nodes.filter((n) => (n.kind === "feature" || n.kind === "error") && standIn(n.index) === n.index);
      first.sort((a, b) => b.influence - a.influence);
      return [
        element("h3", {}, data.target),
        element("p", { class: "where" }, nodes[target].where),
        facts([...targets, ...data.facts]),
        element("h4", {}, "Most influential"),
        element("ol", { class: "first" }, ...first.slice(0, 15).map((n) =>
          element("li", {}, element("span", {}, percent(n.influence)), button(n.index)))),
        element("p", { class: "hint" }, "Open a node to see what it is made of, to pin it or to give it another name; " +
          "hover an edge for its number. The address keeps what you change."),
      ];
    }

    const facts = (pairs) => element("dl", {}, ...pairs.flatMap(([term, text]) =>
      [element("dt", {}, term), element("dd", {}, text)]));

    function details(node) {
      const links = standIn(node.index) === node.index ? ways[state.way] : baseWays[state.way];
      const into = bySize(links.filter((link) => link.target === node.index));
      const out = bySize(links.filter((link) => link.sources.includes(node.index)));
      const close = element("button", { type: "button", class: "close", "aria-label": "Close", click: () => {
        open(-1);
        nodes[standIn(node.index)].dot.focus();
      } }, "×");
      const parts = [element("h3", {}, node.name), close, element("p", { class: "where" }, node.where),
        ...(isChosen(node) ? [tools(node)] : []),
        facts([[node.measure, number(node.value)], ["influence on the target", percent(node.influence)]]),
        ...(node.members ? [element("h4", {}, "Nodes in it"), element("ul", { class: "first" }, ...node.members.map((n) =>
          element("li", {}, element("span", {}, percent(base[n].influence)), button(n))))] : []),
        ...dashboard(data.features[node.key]), ...dashboardLink(node)];
      if (into.length) {
        const gap = `; the whole sum is off by ${node.relative_error.toExponential(1)} of its absolute parts`;
        parts.push(element("h4", {}, `Made of ${count(into.length)} parts`),
          element("p", { class: "sum" },
            `They add up to ${number(sum(into, (link) => link.weight))}${node.expanded ? gap : ""}.`),
          ...linkTable(into, from, state.way === "pairs" ? "parts, pairs whole" : "parts, pairs halved"));
      } else parts.push(element("p", { class: "hint" }, node.end));
      if (data.heads[node.index]) parts.push(element("h4", {}, "Through attention"), chips(data.heads[node.index]));
      if (out.length)
        parts.push(element("h4", {}, "Goes into"), ...linkTable(out, (link) => {
          const partner = link.sources.find((source) => source !== node.index);
          const together = partner === undefined ? [] : [element("small", {}, " with "), button(partner)];
          return [button(link.target), ...together];
        }, "contributions"));
      return parts;
    }

    // What can be done with a node that is open.
    function tools(node) {
      const name = element("input", {
        type: "text", value: node.name, "aria-label": "Name of this node", autocomplete: "off",
        change: () => rename(node.index, name.value),
      });
      const pressed = String(isPinned(node.index));
      return element("p", { class: "tools" },
        element("label", {}, "name ", name),
        element("button", { type: "button", class: "tool pin", "aria-pressed": pressed, click: () => pin(node.index) },
          isPinned(node.index) ? "unpin" : "pin"),
        ...(node.members ? [tool("ungroup", "Show its nodes one by one", () => ungroup(node.index))] : []));
    }

    const dashboardLink = (node) => (data.dashboards[node.key]
      ? [element("p", { class: "hint" }, element("a", { href: data.dashboards[node.key] }, "Its dashboard"))] : []);

    const chips = (values) => element("p", { class: "chips" }, ...values.map(([text, value]) =>
      element("span", { class: sign(value) }, text, element("small", {}, number(value)))));

    function dashboard(feature) {
      if (!feature) return [];
      const parts = [element("h4", {}, "Fires on"), element("p", { class: "where" }, feature.summary)];
      const strongest = Math.max(...feature.examples.flatMap(({ values }) => values.map(Math.abs)), 1e-12);
      const strip = ({ tokens, values, focus }) =>
        element("div", { class: "bilens-strip" }, ...tokens.flatMap((token, place) => [
          token.startsWith(" ") ? " " : "",
          element("span", {
            class: `${values[place] < 0 ? "n" : "p"}${place === focus ? " f" : ""}`, title: number(values[place]),
            style: `--a:${(0.6 * Math.abs(values[place]) / strongest).toFixed(2)}`,
          }, token.replace(/^ /, "")),
        ]));
      parts.push(...feature.examples.slice(0, EXAMPLES).map(strip));
      if (feature.examples.length > EXAMPLES) {
        const more = element("button", { type: "button", class: "more", click: () =>
          more.replaceWith(...feature.examples.slice(EXAMPLES).map(strip)) }, "more examples");
        parts.push(more);
      }
      for (const [title, effects] of feature.effects)
        parts.push(element("h4", {}, title), chips(effects));
      return parts;
    }

    // --- changes ---

    const isDark = () => {
      const chosen = document.documentElement.dataset.theme;
      return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    };

    function showTheme() {
      theme.textContent = isDark() ? "☀ light" : "☾ dark";
      theme.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
    }

    function toggleTheme() {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      recolor();
    }

    function recolor() {
      showTheme();
      paintBackdrop();
      paint();
    }

    function redraw({ printedWidth = 0, hasty = false } = {}) {
      choose();
      fillHeadline();
      place(printedWidth);
      sampled = null;
      paintBackdrop(hasty);
      paint();
    }

    function set(change, hasty = false) {
      Object.assign(state, change);
      redraw({ hasty });
      if ("way" in change) fillPanel();
      if ("n" in change) remember();
    }

    // --- pictures ---

    // What is shown, as shapes and texts in the colours of the page.
    function picture() {
      const style = getComputedStyle(root), ink = inks(), margin = 112, top = 34;
      const color = (name) => style.getPropertyValue(name).trim();
      const items = [];
      const text = (x, y, words, more) => items.push({ text: words, x: x + margin, y: y + top, size: 11,
        fill: color("--ink"), ...more });
      text(8 - margin, -12, `${data.target} ${number(base[target].value)}`, { size: 14, bold: true });
      for (const span of rows.children)
        text(-10, parseFloat(span.style.top) + 4, span.textContent, { anchor: "end", fill: color("--muted") });
      const drawn = shown.map((link) => ({ link, size: sizeOf(link) })).sort((a, b) => a.size - b.size);
      for (const { link, size } of drawn) {
        const { parts, joint } = curves(nodes, link), stroke = ink[sign(link.weight)].trim();
        const d = parts.map(([x0, y0, ...curve]) => `M${x0} ${y0}C${curve.join(" ")}`).join("");
        items.push({ d, x: margin, y: top, stroke, width: 0.5 + 4.5 * size, alpha: 0.16 + 0.6 * size });
        if (joint) items.push({ d: SYMBOLS.feature(1.6 + 2.4 * size), x: margin + joint[0], y: top + joint[1], fill: stroke });
      }
      for (const node of nodes.filter((each) => each.placed)) {
        const own = getComputedStyle(node.shape);
        const dash = own.strokeDasharray === "none" ? undefined : own.strokeDasharray.replaceAll("px", "");
        items.push({ d: SYMBOLS[node.kind](node.r), x: node.x + margin, y: node.y + top, fill: own.fill,
          stroke: own.stroke, width: parseFloat(own.strokeWidth), dash });
        if (node.members)
          text(node.x, node.y + 3.5, String(node.members.length), { anchor: "middle", size: 10, fill: color("--paper") });
      }
      for (const label of labels.children) {
        const at = (name) => label.getAttribute(name);
        text(Number(at("x")), Number(at("y")), label.textContent, { anchor: at("text-anchor"), halo: color("--paper") });
      }
      for (const { left, right, token, position } of laid.columns) {
        const x = (left + right) / 2, y = laid.height - laid.foot;
        if (position < 0) continue;
        if (laid.turned) text(x + 4, y + 8, short(token), { anchor: "end", size: 12, turned: true });
        else text(x, y + 18, short(token), { anchor: "middle", size: 12 });
      }
      return { width: laid.width + margin + 8, height: laid.height + top, paper: color("--paper"), items };
    }

    // To the clipboard; where the browser does not let us, into a file.
    async function copy(kind) {
      const drawn = picture();
      const blob = kind === "svg" ? new Blob([BilensGraphPicture.toSvg(drawn)], { type: "image/svg+xml" })
        : await new Promise((done) => { BilensGraphPicture.toCanvas(drawn, 2).toBlob(done, "image/png"); });
      try {
        if (kind === "svg") await navigator.clipboard.writeText(await blob.text());
        else await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        status.textContent = `The graph is on the clipboard as ${kind.toUpperCase()}.`;
      } catch (refused) {
        const link = element("a", { href: URL.createObjectURL(blob), download: `graph.${kind}` });
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
        status.textContent = `The graph was saved as graph.${kind}.`;
      }
    }

    let themeBefore = null;
    addEventListener("beforeprint", () => {
      themeBefore = document.documentElement.dataset.theme;
      document.documentElement.dataset.theme = "light";
      scroll.scrollLeft = 0;
      redraw({ printedWidth: PRINTED_WIDTH });
    });
    addEventListener("afterprint", () => {
      if (themeBefore) document.documentElement.dataset.theme = themeBefore;
      else delete document.documentElement.dataset.theme;
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => recolor());
    let width = 0;
    new ResizeObserver(() => {
      if (scroll.clientWidth === width) return;
      width = scroll.clientWidth;
      redraw();
    }).observe(scroll);
    base.forEach(addDot);
    recall();
    regroup();
    undo.disabled = edits().every((part) => part === null);
    showTheme();
    fillPanel();
    redraw();
  };

  return { draw };
})();
