"use strict";
const page = document.documentElement;
const figures = JSON.parse(document.getElementById("figures").textContent);

// A figure names its colours as the style sheet does: var(--name).
function coloured(node, style) {
  if (typeof node === "string") {
    const name = /^var\((--[a-z0-9-]+)\)$/.exec(node);
    return name ? style.getPropertyValue(name[1]).trim() : node;
  }
  if (Array.isArray(node)) return node.map((part) => coloured(part, style));
  if (node && typeof node === "object")
    return Object.fromEntries(Object.entries(node).map(([key, part]) => [key, coloured(part, style)]));
  return node;
}

async function draw() {
  const style = getComputedStyle(page);
  let drawn = 0;
  for (const place of document.querySelectorAll("[data-chart]")) {
    const { data, layout } = coloured(figures[place.dataset.chart], style);
    await Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
    drawn += 1;
  }
  page.dataset.charts = drawn;
}

// A picture or video of a few pixels is enlarged by a whole factor, and kept crisp.
function enlarge(medium, width, height, wanted) {
  const factor = Math.floor(wanted / Math.max(width, height));
  if (factor < 2) return;
  medium.classList.add("pixels");
  medium.style.width = `${width * factor}px`;
}

function loaded(medium) {
  return new Promise((done) => {
    const isImage = medium.tagName === "IMG";
    const finish = (ready) => {
      medium.dataset.mediaReady = ready;
      if (ready && isImage) enlarge(medium, medium.naturalWidth, medium.naturalHeight, 160);
      if (ready && medium.tagName === "VIDEO") enlarge(medium, medium.videoWidth, medium.videoHeight, 256);
      if (!ready) {
        const note = document.createElement("p");
        note.className = "missing";
        note.textContent = `This browser cannot show ${medium.title}.`;
        medium.after(note);
      }
      done();
    };
    const now = () => (isImage ? medium.complete && medium.naturalWidth > 0 : medium.readyState >= 1);
    if (now()) return finish(true);
    medium.addEventListener(isImage ? "load" : "loadedmetadata", () => finish(true), { once: true });
    medium.addEventListener("error", () => finish(false), { once: true });
    if (medium.error || (isImage && medium.complete)) finish(false);
  });
}

for (const box of document.querySelectorAll('input[type="search"]'))
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const row of box.parentElement.querySelectorAll(".keys > div"))
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });

const links = [...document.querySelectorAll("nav a")];
function mark() {
  const passed = links.filter((link) => document.querySelector(link.hash).getBoundingClientRect().top < 160);
  const atEnd = scrollY > 0 && innerHeight + scrollY >= page.scrollHeight - 4;
  const here = atEnd ? links.at(-1) : passed.at(-1);
  for (const link of links) link.classList.toggle("here", link === here);
}
addEventListener("scroll", mark, { passive: true });
mark();

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
Promise.all([draw(), ...[...document.querySelectorAll(".medium")].map(loaded)]).then(() => (page.dataset.ready = "true"));
