// The read-out: the nearest point of every curve under the pointer, read off the drawn paths.
"use strict";
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toPrecision(4) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(4) + "M";
  if (size >= 1e5) return (value / 1e3).toPrecision(4) + "k";
  return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};

function curves(svg) {
  return [...svg.querySelectorAll("[data-series]")].map((group) => {
    const path = group.querySelector("path");
    const points = [...path.getAttribute("d").matchAll(/[ML]\s*(-?[\d.]+)\s+(-?[\d.]+)/g)].map((match) => [Number(match[1]), Number(match[2])]);
    return { name: group.dataset.series, colour: getComputedStyle(path).stroke, points };
  });
}

for (const svg of document.querySelectorAll("svg[data-scales]")) {
  const { box, x, y, log, xlabel } = JSON.parse(svg.dataset.scales);
  const [left, top, right, bottom] = box;
  const xOf = (px) => x[0] + ((px - left) / (right - left)) * (x[1] - x[0]);
  const yOf = (py) => {
    const share = (bottom - py) / (bottom - top);
    return log ? y[0] * (y[1] / y[0]) ** share : y[0] + share * (y[1] - y[0]);
  };
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  let read = null;
  const leave = () => { tip.hidden = true; line.remove(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (at.x < left || at.x > right || at.y < top || at.y > bottom) return leave();
    read ??= curves(svg);
    tip.replaceChildren();
    let place = null;
    for (const { name, colour, points } of read) {
      let near = points[0];
      for (const point of points) if (Math.abs(point[0] - at.x) < Math.abs(near[0] - at.x)) near = point;
      if (!near) continue;
      place ??= near[0];
      const row = document.createElement("div"), value = document.createElement("b");
      row.style.color = colour;
      value.textContent = short(yOf(near[1]));
      row.append(name + " ", value);
      tip.append(row);
    }
    if (place === null) return leave();
    const head = document.createElement("div");
    const value = xlabel.includes("step") ? Math.round(xOf(place)).toLocaleString("en") : short(xOf(place));
    head.textContent = xlabel.includes("step") ? "step " + value : value + (xlabel.includes("hours") ? " h" : " tokens");
    tip.prepend(head);
    for (const [name, number] of Object.entries({ x1: place, x2: place, y1: top, y2: bottom })) line.setAttribute(name, number);
    svg.append(line);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.min(event.clientX + 14, innerWidth - width - 6) + "px";
    tip.style.top = Math.max(6, event.clientY - height - 12) + "px";
  });
}
