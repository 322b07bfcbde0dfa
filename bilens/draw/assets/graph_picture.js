// The graph as a picture of its own: a list of shapes and texts, written as SVG or painted on a canvas.
//
// A shape has a `d`, its `x` and `y`, and `fill`, `stroke`, `width`, `alpha`, `dash`; a text has `text`, `x`, `y`,
// `fill`, `size`, `anchor`, `halo`, `bold`, `turned`.
const BilensGraphPicture = (() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const FONT = "system-ui, sans-serif";

  function toSvg({ width, height, paper, items }) {
    const made = (name, attributes) => {
      const element = document.createElementNS(SVG, name);
      for (const [key, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(key, value);
      return element;
    };
    const svg = made("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": FONT });
    svg.append(made("rect", { width, height, fill: paper }));
    for (const item of items) {
      const { d, x = 0, y = 0, fill = "none", stroke, width: line, alpha, dash, size, anchor, halo, bold, turned } = item;
      if (d !== undefined)
        svg.append(made("path", { d, transform: `translate(${x} ${y})`, fill, stroke, "stroke-width": line,
          "stroke-dasharray": dash, opacity: alpha }));
      else {
        const place = turned ? { transform: `translate(${x} ${y}) rotate(-90)` } : { x, y };
        const rim = halo ? { stroke: halo, "stroke-width": 3, "paint-order": "stroke", "stroke-linejoin": "round" } : {};
        const text = made("text", { ...place, fill, "font-size": size, "text-anchor": anchor, ...rim,
          "font-weight": bold ? 600 : undefined });
        text.textContent = item.text;
        svg.append(text);
      }
    }
    return new XMLSerializer().serializeToString(svg);
  }

  function toCanvas({ width, height, paper, items }, scale) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    const on = canvas.getContext("2d");
    on.scale(scale, scale);
    on.fillStyle = paper;
    on.fillRect(0, 0, width, height);
    for (const { d, x = 0, y = 0, fill, stroke, width: line = 1, alpha = 1, dash, text, size, anchor, halo, bold,
      turned } of items) {
      on.save();
      on.translate(x, y);
      on.globalAlpha = alpha;
      if (d !== undefined) {
        const path = new Path2D(d);
        on.setLineDash(dash ? dash.split(/[ ,]+/).map(parseFloat) : []);
        if (fill && fill !== "none") Object.assign(on, { fillStyle: fill }).fill(path);
        if (stroke) Object.assign(on, { strokeStyle: stroke, lineWidth: line }).stroke(path);
      } else {
        if (turned) on.rotate(-Math.PI / 2);
        Object.assign(on, { font: `${bold ? 600 : 400} ${size}px ${FONT}`, lineJoin: "round",
          textAlign: { middle: "center", end: "right" }[anchor] || "left" });
        if (halo) Object.assign(on, { strokeStyle: halo, lineWidth: 3 }).strokeText(text, 0, 0);
        Object.assign(on, { fillStyle: fill }).fillText(text, 0, 0);
      }
      on.restore();
    }
    return canvas;
  }

  return { toCanvas, toSvg };
})();
