// Everything a reader would do, by the events that the browser would send; what is seen after each goes to the dump.
// Put behind a page with a graph, after the names of the nodes to open (`OPENED`) and the text to search (`SEARCHED`).
const all = (selector) => [...document.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
const drawn = () =>
  all(".node")
    .filter((node) => node.style.display !== "none")
    .map((node) => node.dataset.node);
const key = (element, name) =>
  element.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const weights = () => {
  all(".panel .more").forEach((more) => more.click());
  return one(".panel table")
    ? [...one(".panel table").querySelectorAll("tr")].map((row) => Number(row.dataset.weight))
    : [];
};
const input = (element, value) => {
  element.value = value;
  element.dispatchEvent(new Event("input"));
};
const color = () => getComputedStyle(one(".bilens-graph")).getPropertyValue("--positive").trim();
function act() {
  const seen = { start: one(".panel h3").textContent, names: all(".node").map((n) => n.getAttribute("aria-label")) };
  const slider = one("input[type=range]"),
    search = one("input[type=search]");
  seen.headline = one(".headline").textContent;
  seen.shares = [1, 5, slider.max].map((n) => {
    input(slider, n);
    const parts = all(".shares .part").map((part) => part.textContent);
    return [one(".slider output").value, drawn().length, one(".status").textContent, parts];
  });
  const scroll = one(".scroll");
  scroll.style.maxWidth = "260px";
  input(slider, 1);
  input(slider, slider.max);
  const at = Number(one('[data-node="target"]').getAttribute("transform").match(/[\d.]+/)[0]);
  const room = scroll.clientWidth - one(".rows").offsetWidth;
  seen.narrow = [scroll.scrollWidth - scroll.clientWidth, at - scroll.scrollLeft, room];
  scroll.style.maxWidth = "";
  input(slider, slider.max);
  const find = (id) => all(".node").find((node) => node.dataset.node === id);
  seen.panels = {};
  for (const id of OPENED) {
    find(id).dispatchEvent(new MouseEvent("click", { bubbles: true }));
    seen.panels[id] = {
      heading: one(".panel h3").textContent,
      weights: weights(),
      open: all(".node.open").map((n) => n.dataset.node),
      strips: all(".panel .bilens-strip").length,
    };
  }
  const row = all(".panel tbody tr").find((tr) => tr.querySelectorAll(".to").length === 2);
  row.dispatchEvent(new MouseEvent("mouseenter"));
  seen.partners = [
    [...row.querySelectorAll(".to")].map((to) => to.dataset.to),
    all(".node.near").map((n) => n.dataset.node),
  ];
  row.dispatchEvent(new MouseEvent("mouseleave"));
  one("input[value=folded]").click();
  seen.folded = weights();
  one("input[value=pairs]").click();
  find("target").focus();
  seen.walk = ["ArrowDown", "ArrowDown", "Enter"].map((name) => {
    key(document.activeElement, name);
    return [document.activeElement.dataset.node, one(".panel h3").textContent];
  });
  key(document.activeElement, "Escape");
  seen.escaped = [document.activeElement.dataset.node, one(".panel h3").textContent, all(".node.open").length];
  seen.stops = all('.node[tabindex="0"]').length;
  key(document.body, "/");
  seen.slash = document.activeElement === search;
  input(search, SEARCHED);
  seen.found = [all(".node.found").map((n) => n.dataset.node), one(".status").textContent];
  key(search, "Enter");
  seen.searched = one(".panel .where").textContent;
  key(search, "Escape");
  seen.cleared = [search.value, all(".node.found").length];
  const box = one(".stage").getBoundingClientRect();
  edge: for (let y = 5; y < box.height; y += 7)
    for (let x = 5; x < box.width; x += 7) {
      one(".stage").lastChild.dispatchEvent(
        new MouseEvent("mousemove", { clientX: box.left + x, clientY: box.top + y, bubbles: true }),
      );
      if (!one(".tip").hidden) break edge;
    }
  seen.edge = one(".tip").textContent;
  const before = color();
  one(".theme").click();
  seen.theme = [before, document.documentElement.dataset.theme, color()];
  one(".theme").click();
  seen.theme.push(document.documentElement.dataset.theme);
  one("input[type=checkbox]").click();
  seen.rest = drawn();
  one("input[type=checkbox]").click();
  seen.edits = [];
  for (const id of OPENED) {
    find(id).dispatchEvent(new MouseEvent("click", { bubbles: true }));
    one(".panel .pin").click();
    seen.edits.push([one(".panel .pin").textContent, all(".node.pinned").map((n) => n.dataset.node)]);
  }
  const name = one(".panel .tools input");
  name.value = "<b>mine";
  name.dispatchEvent(new Event("change"));
  seen.renamed = [one(".panel h3").textContent, find(OPENED[1]).getAttribute("aria-label")];
  const tool = (text) => all(".tool").find((button) => button.textContent.startsWith(text));
  tool("group pinned").click();
  const members = all(".panel ul .to").map((to) => to.dataset.to);
  seen.grouped = [one(".panel h3").textContent, members, drawn().filter((id) => OPENED.includes(id)), weights()];
  seen.hash = location.hash;
  const told = BilensGraphPicture.toSvg({ width: 9, height: 9, paper: "#fff", items: [{ text: "<x>", x: 1, y: 2 }] });
  seen.svg = new DOMParser().parseFromString(told, "image/svg+xml").querySelector("text").textContent;
  tool("ungroup").click();
  seen.ungrouped = drawn().filter((id) => OPENED.includes(id));
  tool("undo").click();
  seen.undone = [location.hash, find(OPENED[1]).getAttribute("aria-label")];
  dispatchEvent(new Event("beforeprint"));
  seen.printed = [all("svg[role=group] .feet text.token, svg[role=group] .feet text.turned").map((t) => t.textContent)];
  seen.printed.push(scroll.scrollLeft, all("details[open]").length, all("details:not([open])").length);
  dispatchEvent(new Event("afterprint"));
  return seen;
}
const wait = () => {
  if (!one(".node")) return setTimeout(wait, 50);
  let seen;
  try {
    seen = act();
  } catch (error) {
    seen = { error: error.stack };
  }
  document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
};
wait();
