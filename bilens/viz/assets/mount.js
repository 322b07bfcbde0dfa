(() => {
  "use strict";
  const drawers = {
    circuitsvis(target, { component, props }) {
      target.id = `bilens-${Math.random().toString(36).slice(2)}`;
      CircuitsVis.render(target.id, CircuitsVis[component], props);
    },
    plotly(target, { data, layout }) {
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
  const views = document.querySelectorAll(".bilens-view");
  // A view is drawn when it comes near: a long page opens at once, and one inside closed details finds its width.
  const nearby = new IntersectionObserver(
    (entries) => entries.forEach((entry) => entry.isIntersecting && draw(entry.target)),
    { rootMargin: "1000px" },
  );
  views.forEach((view) => nearby.observe(view));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    views.forEach(draw);
  });
})();
