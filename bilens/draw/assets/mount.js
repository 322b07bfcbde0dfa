(() => {
  "use strict";
  const PRINTED_WIDTH = 680;
  const drawers = {
    circuitsvis(target, { component, props }) {
      target.id = `bilens-${Math.random().toString(36).slice(2)}`;
      CircuitsVis.render(target.id, CircuitsVis[component], props);
    },
    graph(target, data) {
      BilensGraph.draw(target, data);
    },
    plotly(target, { data, layout }) {
      // On paper a figure is made as small as a page: its squares stay squares.
      target.style.setProperty("--height", parseInt(target.style.minHeight));
      if (layout.width) target.style.setProperty("--width", layout.width);
      Plotly.newPlot(target, data, layout, {
        responsive: true,
        displaylogo: false,
        // By default plotly.js offers to upload the figure.
        showSendToCloud: false,
        plotlyServerURL: "",
        modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
      });
    },
  };
  const draw = (view) => {
    if (view.drawn) return;
    view.drawn = true;
    const [data, target] = view.children;
    drawers[view.dataset.draw](target, JSON.parse(data.textContent));
  };
  const views = [...document.querySelectorAll(".bilens-view")];

  // What is near is drawn first, the rest when there is time; a plot that is folded away, once it is opened and has a
  // width. Tokens need none, and are there when the page is printed: what draws them does it a moment later.
  const nearby = new IntersectionObserver(
    (entries) => entries.forEach((entry) => entry.isIntersecting && draw(entry.target)),
    { rootMargin: "500px" },
  );
  views.forEach((view) => nearby.observe(view));
  const idle = (next) => (window.requestIdleCallback || setTimeout)(next, { timeout: 100 }); // printed, it never idles
  const rest = [...views];
  const drawRest = () => {
    const view = rest.shift();
    if (!view) return;
    if (view.dataset.draw === "circuitsvis" || !view.closest("details:not([open])")) draw(view);
    idle(drawRest);
  };
  idle(drawRest);

  const resizePlots = (layout) =>
    document.querySelectorAll('.js-plotly-plot:not([style*="--width"])').forEach((plot) => Plotly.relayout(plot, layout));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not(.unprinted)").forEach((details) => (details.open = true));
    views.forEach((view) => view.closest("details:not([open])") || draw(view));
    resizePlots({ width: PRINTED_WIDTH });
  });
  addEventListener("afterprint", () => resizePlots({ width: null, autosize: true }));
})();
