"use strict";
// Reads, never draws: the page is complete without this. The values of a chart are taken from its
// path data (a square of SIDE units) and the axes written on the figure.
(() => {
  const SIDE = 10000;
  document.documentElement.classList.add("scripted");

  const short = (value) => {
    for (const [size, letter] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size * 0.9995) return plain(value / size, 3) + letter;
    return plain(value, 3);
  };
  const plain = (value, digits = 4) => {
    const size = value ? Math.floor(Math.log10(Math.abs(value))) : 0;
    if (value && size < -4) return value.toExponential(2);
    return value.toLocaleString("en", { maximumFractionDigits: Math.max(digits - 1 - size, 0) });
  };
  const formats = {
    number: plain,
    short,
    decimals: (value) => value.toFixed(3),
    percent: (value) => `${(100 * value).toFixed(1)}\u202f%`,
  };

  const curve = (path, yAxis) => {
    const [low, high, log] = yAxis;
    const [bottom, top] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
    const numbers = path.getAttribute("d").match(/-?\d+/g).map(Number);
    const points = [];
    for (let i = 0; i < numbers.length; i += 2) {
      const value = bottom + (1 - numbers[i + 1] / SIDE) * (top - bottom);
      points.push({ x: numbers[i] / SIDE, y: numbers[i + 1] / SIDE, value: log ? 10 ** value : value });
    }
    return { points, color: getComputedStyle(path).color };
  };

  const nearest = (points, x) => {
    let low = 0;
    let high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle].x < x) low = middle;
      else high = middle;
    }
    return Math.abs(points[low].x - x) < Math.abs(points[high].x - x) ? points[low] : points[high];
  };

  const readout = (chart) => {
    const plot = chart.querySelector(".plot");
    const outputs = [...chart.querySelectorAll("output")];
    const last = outputs.map((output) => output.textContent);
    const xAxis = chart.dataset.x.split(",").map(Number);
    const yAxis = chart.dataset.y.split(",").map(Number);
    const cross = document.createElement("div");
    cross.className = "cross";
    let spots = [];
    let at = 1;

    const hide = () => {
      cross.remove();
      spots.forEach((spot) => spot.remove());
      outputs.forEach((output, i) => (output.textContent = last[i]));
    };
    const show = (share) => {
      const curves = [...plot.querySelectorAll("path[data-name]")].map((path) => curve(path, yAxis));
      spots.forEach((spot) => spot.remove());
      at = Math.min(Math.max(share, 0), 1);
      // The cross stands on a point of the first curve that is near, so that x and value agree.
      const found = curves.map((one) => nearest(one.points, at));
      const x = found.reduce((a, b) => (Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a)).x;
      cross.style.left = `${100 * x}%`;
      cross.classList.toggle("left", x > 0.6);
      cross.dataset.at = `${short(xAxis[0] + x * (xAxis[1] - xAxis[0]))} ${chart.dataset.unit}`;
      plot.append(cross);
      spots = found.map((point, i) => {
        outputs[i].textContent = formats[chart.dataset.format](point.value);
        const spot = document.createElement("div");
        spot.className = "spot";
        Object.assign(spot.style, { left: `${100 * point.x}%`, top: `${100 * point.y}%`, color: curves[i].color });
        if (point.y >= 0 && point.y <= 1) plot.append(spot);
        return spot;
      });
    };

    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", `${chart.querySelector("h3").textContent}: arrow keys read values`);
    const follow = (event) => {
      const box = plot.getBoundingClientRect();
      show((event.clientX - box.left) / box.width);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!way) return;
      event.preventDefault();
      chart.querySelector(".legend").setAttribute("aria-live", "polite");
      show(at + way * (event.shiftKey ? 0.1 : 0.01));
    });
  };
  document.querySelectorAll("figure.chart").forEach(readout);

  const line = document.querySelector(".readout");
  for (const pre of document.querySelectorAll(".passage pre"))
    pre.addEventListener("pointerover", (event) => {
      const token = event.target.closest("span[title]");
      if (!token) return;
      const text = document.createElement("b");
      text.textContent = token.textContent.replace(/\n/g, "").replace(/ /g, "\u00b7");
      line.replaceChildren(text, `  ${token.title}`);
    });

  for (const button of document.querySelectorAll(".copy"))
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // no permission: select, so that one key copies
      }
    });

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((one) => (one.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((one) => (one.open = false)));
})();
