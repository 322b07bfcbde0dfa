// The geometry of an attribution graph, without a screen: which links there are, where nodes, links and names go.
//
// A node has a `row`, a `position` (its column; -1 for those of no position), `placed` if it is shown; laying out gives
// it `x`, `y` and a radius `r`. A link has `sources` (one, or the two of a pair; a square names its one twice), a
// `target`, all by index, and its numbers.
const BilensGraphLayout = (() => {
  "use strict";
  const LABELS = 60, LABEL_LENGTH = 28, MOST_AIR = 78, LINE = 6;
  const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
  const short = (text) => (text.length > LABEL_LENGTH ? `${text.slice(0, LABEL_LENGTH - 1)}…` : text);
  const isRest = (node) => node.kind === "bias" || node.kind === "other";

  // --- links, strongest first ---

  const strongestFirst = (links) => links.sort((a, b) => b.influence - a.influence);

  const asPairs = (data) =>
    strongestFirst([
      ...data.edges.map(([source, target, weight, influence, via, viaWeight]) => ({
        sources: [source], target, weight, influence, via, viaWeight,
      })),
      ...data.pairs.map(([i, j, target, weight, influence]) => ({ sources: [i, j], target, weight, influence })),
    ]);

  // Half of each pair to each member.
  const folded = (data) => {
    const links = new Map();
    const add = (source, target, weight, influence, via, viaWeight) => {
      const key = source * data.nodes.length + target;
      const link = links.get(key) || { sources: [source], target, weight: 0, influence: 0 };
      Object.assign(link, { weight: link.weight + weight, influence: link.influence + influence });
      if (via) Object.assign(link, { via, viaWeight });
      links.set(key, link);
    };
    data.edges.forEach((edge) => add(...edge));
    for (const [i, j, target, weight, influence] of data.pairs)
      for (const member of [i, j]) add(member, target, weight / 2, influence / 2);
    return strongestFirst([...links.values()]);
  };

  // The same links with some ends taken together: `to` gives each node's stand-in; what would lead to itself is left out.
  const together = (links, to) => {
    const found = new Map();
    for (const link of links) {
      const sources = link.sources.map(to).sort((a, b) => a - b), target = to(link.target);
      if (sources.includes(target)) continue;
      const key = `${sources} ${target}`, known = found.get(key);
      if (!known) found.set(key, { ...link, sources, target });
      else {
        if (Math.abs(link.viaWeight || 0) > Math.abs(known.viaWeight || 0))
          Object.assign(known, { via: link.via, viaWeight: link.viaWeight });
        known.weight += link.weight;
        known.influence += link.influence;
      }
    }
    return strongestFirst([...found.values()]);
  };

  // --- shares ---

  // Where the influence of the targets ends if it is handed on through `shown` nodes alone; all of it together is theirs.
  // `links` have one source each.
  function ends(nodes, links, shown) {
    const into = new Float64Array(nodes.length);
    for (const { target, influence } of links) into[target] += influence;
    let last = nodes.map((node) => (node.kind === "target" ? node.influence : 0));
    const arrived = [...last];
    for (let step = 0; step < nodes.length && last.some((share) => share > 1e-15); step++) {
      const next = new Array(nodes.length).fill(0);
      for (const { sources, target, influence } of links)
        if (shown(target) && last[target]) next[sources[0]] += (influence / into[target]) * last[target];
      next.forEach((share, index) => { arrived[index] += share; });
      last = next;
    }
    const sums = { tokens: 0, biases: 0, errors: 0, whole: 0, hidden: 0 };
    nodes.forEach(({ kind, id }, index) => {
      if (shown(index) && into[index]) return;
      const what = kind === "other" ? { "other tokens": "embedding", "other errors": "error" }[id] || "hidden" : kind;
      const leaf = { embedding: "tokens", bias: "biases", error: "errors", mlp: "whole" }[what];
      sums[leaf || (shown(index) ? "whole" : "hidden")] += arrived[index];
    });
    return sums;
  }

  // --- nodes ---

  // The nodes shown, by column and row; in a cell the most influential first, errors last.
  function cellsOf(nodes, tokens) {
    const shown = nodes.filter((node) => node.placed);
    const positions = shown.some((node) => node.position >= 0) ? [...tokens.keys()] : [];
    if (shown.some((node) => node.position < 0)) positions.push(-1);
    const columns = new Map(
      positions.map((position) => [position, { position, token: tokens[position] || "", cells: new Map() }]));
    shown.sort((a, b) => (a.kind === "error") - (b.kind === "error") || b.influence - a.influence);
    for (const node of shown) {
      const { cells } = columns.get(node.position);
      cells.set(node.row, [...(cells.get(node.row) || []), node]);
    }
    return [...columns.values()];
  }

  // Few nodes stand in a line, with room for their names. Tokens are turned, and blocks of nodes shrink, before the graph
  // gets wider than its place.
  function setColumns(columns, width) {
    for (const column of columns) {
      const most = Math.max(0, ...[...column.cells.values()].map((cell) => cell.length));
      column.across = most <= LINE ? most : Math.ceil(Math.sqrt(1.8 * most));
      column.letters = 6.5 * short(column.token).length + 8;
    }
    const natural = (column, step, turned) => Math.max(column.across * step + 10, turned ? 20 : column.letters);
    const total = (step, turned) => sum(columns, (column) => natural(column, step, turned));
    const ways = [[110, false], [84, false], [110, true], [84, true], [64, true], [48, true], [34, false], [34, true],
      [22, false], [22, true], [19, true], [16, true], [14, true]];
    const [step, turned] = ways.find((way) => total(...way) <= width) || ways[ways.length - 1];
    // What is left of the width goes where the nodes are.
    const spare = Math.max(0, width - total(step, turned)) / (sum(columns, (column) => column.across ** 2) || 1);
    let x = 0;
    for (const column of columns) {
      column.left = x;
      x += natural(column, step, turned) + spare * column.across ** 2;
      column.right = x;
      column.step = Math.min(130, Math.max(step, (column.right - column.left - 12) / column.across));
    }
    return { step: Math.min(step, 26), turned, width: Math.max(width, x) };
  }

  // Rows from the bottom up, without those that are empty. Pairs meet between the rows of an MLP's input and output,
  // which are further apart.
  function setBands(columns, rows, step, foot, height, pairs) {
    const lines = rows.map((_, row) =>
      Math.max(0, ...columns.map((column) => Math.ceil((column.cells.get(row) || []).length / (column.across || 1)))));
    const airs = rows.map((name, row) => (!lines[row] ? 0 : pairs && name.endsWith(" in") ? 2.2 : 1));
    const gaps = sum(airs, (air) => air) + 0.5, blocks = sum(lines, (n) => n * step) + foot;
    const air = Math.min(MOST_AIR, Math.max(20, (height - blocks) / gaps));
    let y = blocks + air * gaps - foot;
    const bands = lines.map((n, row) => {
      if (!n) return { top: y, bottom: y, middle: y };
      const below = airs.slice(0, row).filter((own) => own).pop() || 1;
      const bottom = y, under = (air * below) / 2, over = (air * airs[row]) / 2;
      y -= n * step + under + over;
      return { top: y, bottom, middle: bottom - under - (n * step) / 2 };
    });
    return { bands, height: blocks + air * gaps };
  }

  // Every placed node's spot, and the columns, bands and size of the whole.
  function layout(nodes, tokens, rows, wantedWidth, wantedHeight, pairs) {
    const columns = cellsOf(nodes, tokens);
    const { step, turned, width } = setColumns(columns, wantedWidth);
    const foot = turned ? 20 + Math.max(...columns.map((column) => column.letters)) : 44;
    const { bands, height } = setBands(columns, rows, step, foot, wantedHeight, pairs);
    const largest = Math.max(1e-12, ...nodes.map((n) => (n.kind === "target" || isRest(n) ? 0 : n.influence)));
    const radius = (node) => {
      if (node.kind === "target") return 9;
      return isRest(node) ? 5 : 3.2 + (step / 2 - 4.2) * Math.sqrt(Math.min(1, node.influence / largest));
    };
    for (const column of columns)
      for (const [row, cell] of column.cells) {
        const deep = Math.ceil(cell.length / column.across), across = Math.ceil(cell.length / deep);
        cell.forEach((node, order) => {
          const line = Math.floor(order / across), inLine = Math.min(across, cell.length - line * across);
          node.x = (column.left + column.right) / 2 + ((order % across) - (inLine - 1) / 2) * column.step;
          node.y = bands[row].middle + (line - (deep - 1) / 2) * step;
          node.r = radius(node);
        });
      }
    return { columns, bands, width, height, foot, turned };
  }

  // The node an arrow key leads to: left and right in its row, up and down to the nearest.
  function neighbour(nodes, from, key) {
    const way = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const level = key === "ArrowLeft" || key === "ArrowRight";
    const ahead = (n) => (level ? n.row === from.row && (n.x - from.x) * way > 0.5 : (n.y - from.y) * way > 0.5);
    const cost = (n) => Math.abs(n.x - from.x) * (level ? 1 : 2) + Math.abs(n.y - from.y) * (level ? 3 : 1);
    const others = nodes.filter((n) => n.placed && n !== from && ahead(n));
    return others.reduce((best, n) => (best && cost(best) <= cost(n) ? best : n), null);
  }

  // Names beside the first of `wanted` for which there is room.
  function nameSpots(nodes, wanted, width) {
    const boxes = nodes.filter((n) => n.placed).map((n) => [n.x - n.r, n.y - n.r, n.x + n.r, n.y + n.r]);
    const clear = (box) => box[0] >= 2 && box[2] <= width - 2 && box[1] >= 0
      && boxes.every((b) => box[2] <= b[0] || box[0] >= b[2] || box[3] <= b[1] || box[1] >= b[3]);
    const spots = [];
    for (const { x, y, r, name, kind } of wanted.slice(0, LABELS)) {
      const text = short(kind === "error" ? "error" : name), long = 5.9 * text.length + 2;
      const around = [[x + r + 4, y + 3.5, "start"], [x - r - 4, y + 3.5, "end"], [x, y - r - 5, "middle"],
        [x, y + r + 12, "middle"]];
      for (const [atX, atY, anchor] of around) {
        const left = atX - { start: 0, middle: long / 2, end: long }[anchor];
        const box = [left, atY - 9, left + long, atY + 3];
        if (!clear(box)) continue;
        boxes.push(box);
        spots.push({ x: atX, y: atY, anchor, text });
        break;
      }
    }
    return spots;
  }

  // --- curves ---

  // A link as cubic curves, and where the two halves of a pair meet.
  function curves(nodes, { sources, target }) {
    const end = nodes[target], [i, j] = sources.map((source) => nodes[source]);
    const rise = (x0, y0, x1, y1) => {
      const bend = Math.abs(y0 - y1) < 8 ? -30 : (y1 - y0) * 0.5;
      return [x0, y0, x0, y0 + bend, x1, y1 - bend, x1, y1];
    };
    const bottom = end.y + end.r;
    if (!j || (i === j && i.row >= end.row)) return { parts: [rise(i.x, i.y - i.r, end.x, bottom)], joint: null };
    const top = Math.min(i.y - i.r, j.y - j.r);
    const joint = [((i.x + j.x) / 2 + end.x) / 2, bottom + (top - bottom) * 0.5];
    const members = i === j ? [i] : [i, j];
    const parts = [...members.map((m) => rise(m.x, m.y - m.r, ...joint)), rise(...joint, end.x, bottom)];
    return { parts, joint };
  }

  // Points along each link, for `linkAt`.
  const samples = (nodes, links) =>
    links.map((link) => curves(nodes, link).parts.map(([x0, y0, x1, y1, x2, y2, x3, y3]) =>
      Array.from({ length: 17 }, (_, step) => {
        const t = step / 16, s = 1 - t;
        const mix = (a, b, c, d) => s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d;
        return [mix(x0, x1, x2, x3), mix(y0, y1, y2, y3)];
      })));

  // The index of the link nearest to a point, within six pixels; -1 where there is none.
  function linkAt(sampled, x, y) {
    let best = -1, nearest = 6 ** 2;
    sampled.forEach((lines, index) => {
      for (const points of lines)
        for (let k = 1; k < points.length; k++) {
          const [ax, ay] = points[k - 1], dx = points[k][0] - ax, dy = points[k][1] - ay;
          const t = Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy || 1)));
          const distance = (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2;
          if (distance < nearest) [best, nearest] = [index, distance];
        }
    });
    return best;
  }

  return { asPairs, curves, ends, folded, isRest, layout, linkAt, nameSpots, neighbour, samples, short, sum, together };
})();
